"""Gradient estimators: one contract, many small finals."""

from lightning_dni.estimators.conv import ConvEstimator
from lightning_dni.estimators.critic import CriticEstimator
from lightning_dni.estimators.linear import LinearEstimator
from lightning_dni.estimators.local_loss import LocalLossEstimator
from lightning_dni.estimators.mlp import MLPEstimator
from lightning_dni.estimators.zero import ZeroEstimator

__all__ = [
    "ConvEstimator",
    "CriticEstimator",
    "LinearEstimator",
    "LocalLossEstimator",
    "MLPEstimator",
    "ZeroEstimator",
]
