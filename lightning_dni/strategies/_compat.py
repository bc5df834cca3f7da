"""Every Lightning name that is not documented for users, each with a canary in the tests."""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging,)
if hasattr(callbacks, "WeightAveraging"):  # older Lightning has none
    AVERAGING = (*AVERAGING, callbacks.WeightAveraging)

__all__ = [
    "AVERAGING",
    "MisconfigurationException",
    "Precision",
    "StrategyRegistry",
    "TrainerFn",
    "drop_logged_values",
    "log_as_batch",
    "quiet_copy",
    "rank_zero_warn",
    "saves_at_step",
    "thin_sigterm_broadcast",
]


def quiet_copy(module: pl.LightningModule) -> pl.LightningModule:
    """A copy that knows its Trainer, but logs nothing."""
    twin = copy.deepcopy(module)  # leaves the trainer out
    twin.__dict__["_trainer"] = module._trainer
    twin.__dict__["log"] = twin.__dict__["log_dict"] = _ignore
    return twin


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


class _NoResults(_ResultCollection):
    """Takes what a stage without a loss logs, and keeps none of it."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""


def drop_logged_values(trainer: pl.Trainer) -> None:
    """Have this process log nothing: what it has to say would overwrite what the last stage says."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop._results = _NoResults(training=True)
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop._results = _NoResults(training=False)


def log_as_batch(trainer: pl.Trainer, batch: Any) -> None:
    """Have values that are logged from now on count with the rows of `batch` in the mean of the epoch."""
    results = trainer._results
    if results is not None:
        results.batch, results.batch_size = batch, None


def thin_sigterm_broadcast(trainer: pl.Trainer, every: int) -> None:
    """Have the processes ask each other for a SIGTERM at every n-th batch only: each asking waits for all."""
    loop: Any = trainer.fit_loop.epoch_loop
    asks: Callable[[], None] | None = getattr(type(loop), "_broadcast_sigterm_tensor", None)
    if asks is None:  # older Lightning does not ask
        return

    def ask_seldom() -> None:
        if loop.total_batch_idx % every == every - 1:
            asks(loop)  # type: ignore[call-arg]

    loop._broadcast_sigterm_tensor = ask_seldom


def saves_at_step(callback: Callback, step: int) -> bool:
    """Whether `callback` looks at a monitored value after optimizer step `step`."""
    if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
        return False
    every = callback._every_n_train_steps
    return every > 0 and step % every == 0
