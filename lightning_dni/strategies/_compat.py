"""Every Lightning name that is not documented for users, each with a canary in the tests."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["MisconfigurationException", "Precision", "StrategyRegistry", "TrainerFn", "rank_zero_warn"]
