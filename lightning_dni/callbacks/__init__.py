"""Callbacks that watch a fit on synthetic gradients and schedule lambda; they compute no gradient.

They find the engine behind whatever strategy trains, and work with every one that has one.

Example:
    >>> from lightning_dni.callbacks import BPLambdaScheduler, GradientMonitor, LinearWarmup
    >>> callbacks = [GradientMonitor(every_n_train_steps=50), BPLambdaScheduler(LinearWarmup(1000))]
"""

from lightning_dni.callbacks.heatmap import Probe, draw_heatmap, write_heatmap
from lightning_dni.callbacks.monitor import GradientMonitor
from lightning_dni.callbacks.schedulers import Alternation, BPLambdaScheduler, LinearWarmup, StepLambda
from lightning_dni.callbacks.timeline import PipelineTimeline

__all__ = [
    "Alternation",
    "BPLambdaScheduler",
    "GradientMonitor",
    "LinearWarmup",
    "PipelineTimeline",
    "Probe",
    "StepLambda",
    "draw_heatmap",
    "write_heatmap",
]
