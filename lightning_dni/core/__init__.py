"""The engine: boundaries, stages, cuts and the contract of gradient estimators, in torch alone."""

from lightning_dni.core.boundary import BoundarySpec, LeafSpec
from lightning_dni.core.engine import DNIEngine
from lightning_dni.core.estimator import Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.immediate import SplitOptimizer, Updater
from lightning_dni.core.inputs import InputEstimator
from lightning_dni.core.instrument import Instrument, Observation
from lightning_dni.core.optimizer import OptimizerFactory
from lightning_dni.core.pool import EstimatorFactory
from lightning_dni.core.report import BoundaryReport, HasEngine, Observable, StepReport
from lightning_dni.core.target import Denominator, mix_gradients, sg_loss

__all__ = [
    "BoundaryReport",
    "BoundarySpec",
    "DNIEngine",
    "Denominator",
    "EstimatorFactory",
    "Exchange",
    "Feedback",
    "Gradient",
    "GradientEstimator",
    "HasEngine",
    "InputEstimator",
    "Instrument",
    "LeafSpec",
    "Lock",
    "Observable",
    "Observation",
    "OptimizerFactory",
    "Record",
    "Signal",
    "SplitOptimizer",
    "StepReport",
    "Updater",
    "mix_gradients",
    "sg_loss",
]
