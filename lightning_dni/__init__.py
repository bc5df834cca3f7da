"""Train Lightning modules with synthetic gradients (Decoupled Neural Interfaces)."""

from lightning_dni.callbacks import BPLambdaScheduler, GradientMonitor
from lightning_dni.estimators.inputs import MLPInputEstimator
from lightning_dni.strategies import DNIDDPStrategy, DNIPipelineStrategy, DNIStrategy

__version__ = "0.1.0"
__all__ = [
    "BPLambdaScheduler",
    "DNIDDPStrategy",
    "DNIPipelineStrategy",
    "DNIStrategy",
    "GradientMonitor",
    "MLPInputEstimator",
]
