"""All stages decide alike: what the last stage has logged reaches every process that looks at it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_dni.strategies._compat import (
    alone,
    drop_logged_values,
    metric_state,
    metrics_in,
    saves_at_step,
    set_metric_state,
)


class MetricAgreement(EarlyStopping):
    """Hands `trainer.callback_metrics` of the last stage to all others, before anybody decides by them.

    An EarlyStopping by kind only: Lightning runs those after the module's own epoch end, with the callbacks
    that monitor values, and it stands first among them.

    Args:
        evaluated: Called after a validation in which all stages have come together.
    """

    def __init__(self, evaluated: Callable[[], None]) -> None:
        super().__init__(monitor="none")
        self._evaluated = evaluated

    @property
    @override
    def state_key(self) -> str:
        return "lightning_dni.MetricAgreement"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing."""

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what validation has found."""
        if not trainer.sanity_checking:
            share_values(trainer)
            self._evaluated()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share the values of the epoch."""
        share_values(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what the test has found."""
        share_values(trainer)


class StateAgreement(Callback):
    """Hands what the module's torchmetrics have seen to all stages, before anybody computes their values.

    Args:
        is_last: Whether this is a process of the last stage, whose metrics have seen the rows.
    """

    def __init__(self, is_last: bool) -> None:
        self._is_last = is_last

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what metrics have seen in the epoch."""
        share_metrics(trainer, pl_module, self._is_last)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what metrics have seen in the validation."""
        share_metrics(trainer, pl_module, self._is_last)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what metrics have seen in the test."""
        share_metrics(trainer, pl_module, self._is_last)


class StepAgreement(Callback):
    """Shares values in the steps after which a checkpoint is written; it stands before whoever does so."""

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Share values, where a checkpoint is due."""
        if any(saves_at_step(callback, trainer.global_step) for callback in callbacks_of(trainer)):
            share_values(trainer)


def share_for_schedules(trainer: pl.Trainer) -> None:
    """Share values after a batch, where a learning rate schedule looks at one."""
    batch = trainer.fit_loop.batch_idx + 1
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "step" and batch % config.frequency == 0:
            share_values(trainer)
            return


def share_values(trainer: pl.Trainer) -> None:
    """Overwrite `trainer.callback_metrics` with those of the last stage."""
    told = trainer.strategy.broadcast({k: v.detach().cpu() for k, v in trainer.callback_metrics.items()})
    if not trainer.is_global_zero:
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({key: value.to(device) for key, value in told.items()})


def share_metrics(trainer: pl.Trainer, module: pl.LightningModule, is_last: bool) -> None:
    """Have the metrics of other stages have seen what those of the last stage have, in all of its copies.

    Those of the last stage stay as they are: its copies put together what each has seen, as they compute.
    """
    metrics = metrics_in(module)
    if not metrics or trainer.sanity_checking:
        return
    told = trainer.strategy.broadcast([metric_state(metric) for metric in metrics] if is_last else [])
    if not is_last:
        for metric, state in zip(metrics, told, strict=True):
            set_metric_state(metric, *state)


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """The Trainer's list itself, which is set by a connector, untyped."""
    found: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009
    return found


_SAVING = pl.callbacks.Checkpoint


class Agreement:
    """Prepares a Trainer for stages of which only the last one has anything to log, and takes that back.

    Args:
        trainer: This process's.
        module: Its module.
        is_last: Whether its stage has the loss.
        evaluated: Called after a validation in which all stages have come together.
        copies: The processes that run the same stage; None where there is one.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        is_last: bool,
        evaluated: Callable[[], None],
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        self._callbacks = callbacks_of(trainer)
        self._metrics = {
            metric: (metric.distributed_available_fn, metric.process_group) for metric in metrics_in(module)
        }
        for metric in self._metrics:
            if is_last and copies is not None:
                metric.process_group = copies
            else:  # it would gather over all stages, which have nothing
                metric.distributed_available_fn = alone
        if not is_last:
            drop_logged_values(trainer)
        step = StepAgreement()
        last = next(
            (i for i, c in enumerate(self._callbacks) if isinstance(c, _SAVING)), len(self._callbacks)
        )
        self._callbacks.insert(last, step)
        self._own: list[Callback] = [StateAgreement(is_last), MetricAgreement(evaluated), step]
        self._callbacks[:0] = self._own[:2]

    def remove(self) -> None:
        """Leave the Trainer and the module as they were."""
        self._callbacks[:] = [callback for callback in self._callbacks if callback not in self._own]
        for metric, (available, group) in self._metrics.items():
            metric.distributed_available_fn, metric.process_group = available, group
