"""Callbacks that watch a fit on synthetic gradients and schedule lambda; they compute no gradient.

They find the engine behind whatever strategy trains, and work with every one that has one.

Example:
    >>> from lightning_dni.callbacks import BPLambdaScheduler, GradientMonitor, LinearWarmup
    >>> callbacks = [GradientMonitor(every_n_train_steps=50), BPLambdaScheduler(LinearWarmup(1000))]
"""

from lightning_dni.callbacks.heatmap import Probe, draw_heatmap, write_heatmap
from lightning_dni.callbacks.implicit import ImplicitLossMonitor
from lightning_dni.callbacks.landscape import draw_counter_example, draw_loss_surfaces
from lightning_dni.callbacks.monitor import GradientMonitor
from lightning_dni.callbacks.representation_report import Representations, draw_representations
from lightning_dni.callbacks.representations import RepresentationMonitor
from lightning_dni.callbacks.schedulers import Alternation, BPLambdaScheduler, LinearWarmup, StepLambda
from lightning_dni.callbacks.timeline import PipelineTimeline
from lightning_dni.callbacks.tracking import TrackingConditionMonitor

__all__ = [
    "Alternation",
    "BPLambdaScheduler",
    "GradientMonitor",
    "ImplicitLossMonitor",
    "LinearWarmup",
    "PipelineTimeline",
    "Probe",
    "RepresentationMonitor",
    "Representations",
    "StepLambda",
    "TrackingConditionMonitor",
    "draw_counter_example",
    "draw_heatmap",
    "draw_loss_surfaces",
    "draw_representations",
    "write_heatmap",
]
