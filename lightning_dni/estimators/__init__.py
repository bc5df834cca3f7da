"""Gradient estimators: one contract, many small finals."""

from lightning_dni.estimators.backprop import BackpropEstimator
from lightning_dni.estimators.cascade import CriticCascade
from lightning_dni.estimators.control_variate import ControlVariateEstimator
from lightning_dni.estimators.conv import ConvEstimator
from lightning_dni.estimators.critic import CriticEstimator
from lightning_dni.estimators.delayed import DelayedGradientEstimator
from lightning_dni.estimators.direct_feedback_alignment import DirectFeedbackAlignmentEstimator
from lightning_dni.estimators.feedback_alignment import FeedbackAlignmentEstimator
from lightning_dni.estimators.kickback import KickbackEstimator
from lightning_dni.estimators.linear import LinearEstimator
from lightning_dni.estimators.local_loss import LocalLossEstimator
from lightning_dni.estimators.low_rank import LowRankEstimator
from lightning_dni.estimators.mlp import MLPEstimator
from lightning_dni.estimators.probe import ProbeEstimator
from lightning_dni.estimators.recurrent import RecurrentEstimator
from lightning_dni.estimators.sobolev import SobolevEstimator
from lightning_dni.estimators.zero import ZeroEstimator

__all__ = [
    "BackpropEstimator",
    "ControlVariateEstimator",
    "ConvEstimator",
    "CriticCascade",
    "CriticEstimator",
    "DelayedGradientEstimator",
    "DirectFeedbackAlignmentEstimator",
    "FeedbackAlignmentEstimator",
    "KickbackEstimator",
    "LinearEstimator",
    "LocalLossEstimator",
    "LowRankEstimator",
    "MLPEstimator",
    "ProbeEstimator",
    "RecurrentEstimator",
    "SobolevEstimator",
    "ZeroEstimator",
]
