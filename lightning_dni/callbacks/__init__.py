"""Callbacks that watch a fit on synthetic gradients and schedule lambda; they compute no gradient.

They find the engine behind whatever strategy trains, and work with every one that has one.

Example:
    >>> from lightning_dni.callbacks import BPLambdaScheduler, GradientMonitor, LinearWarmup
    >>> callbacks = [GradientMonitor(every_n_train_steps=50), BPLambdaScheduler(LinearWarmup(1000))]
"""

from lightning_dni.callbacks.heatmap import Probe, draw_heatmap, write_heatmap
from lightning_dni.callbacks.monitor import GradientMonitor
from lightning_dni.callbacks.representation_report import Representations, draw_representations
from lightning_dni.callbacks.representations import RepresentationMonitor
from lightning_dni.callbacks.schedulers import Alternation, BPLambdaScheduler, LinearWarmup, StepLambda
from lightning_dni.callbacks.timeline import PipelineTimeline

__all__ = [
    "Alternation",
    "BPLambdaScheduler",
    "GradientMonitor",
    "LinearWarmup",
    "PipelineTimeline",
    "Probe",
    "RepresentationMonitor",
    "Representations",
    "StepLambda",
    "draw_heatmap",
    "draw_representations",
    "write_heatmap",
]
