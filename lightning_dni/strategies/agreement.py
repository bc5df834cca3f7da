"""All stages decide alike: what the last stage has logged reaches every process that looks at it."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_dni.strategies._compat import drop_logged_values, saves_at_step, thin_sigterm_broadcast

SIGTERM_EVERY = 64
"""Batches between two times at which the processes ask each other whether one was told to end."""


class MetricAgreement(EarlyStopping):
    """Hands `trainer.callback_metrics` of the last stage to all others, before anybody decides by them.

    An EarlyStopping by kind only: Lightning runs those after the module's own epoch end, with the callbacks
    that monitor values, and it stands first among them.
    """

    def __init__(self) -> None:
        super().__init__(monitor="none")

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

    def _share(self, trainer: pl.Trainer) -> None:
        mine = {key: float(value) for key, value in trainer.callback_metrics.items()}
        told: dict[str, float] = trainer.strategy.broadcast(mine)
        if not trainer.is_global_zero:
            device = trainer.strategy.root_device
            trainer.callback_metrics.update({k: torch.tensor(v, device=device) for k, v in told.items()})

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Share values at the steps at which somebody decides by one."""
        if self._decides(trainer):
            self._share(trainer)

    def _decides(self, trainer: pl.Trainer) -> bool:
        step = trainer.global_step
        callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector, untyped)
        if any(saves_at_step(callback, step) for callback in callbacks):
            return True
        return any(
            config.reduce_on_plateau and config.interval == "step" and step % config.frequency == 0
            for config in trainer.lr_scheduler_configs
        )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what validation has found."""
        if not trainer.sanity_checking:
            self._share(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share the values of the epoch."""
        self._share(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Share what the test has found."""
        self._share(trainer)


def agree(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    is_last: bool,
    copies: dist.ProcessGroup | None = None,
) -> None:
    """Prepare `trainer` for stages of which only the last one has anything to log.

    Args:
        trainer: This process's.
        module: Its module.
        is_last: Whether its stage has the loss.
        copies: The processes that run the same stage; None where there is one.
    """
    thin_sigterm_broadcast(trainer, SIGTERM_EVERY)
    if not is_last:
        drop_logged_values(trainer)
    for part in module.modules():
        if not isinstance(part, torchmetrics.Metric):
            continue
        if is_last and copies is not None:
            part.process_group = copies
        else:  # it would gather over all stages, which have nothing
            part.distributed_available_fn = _alone
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009
    if not any(isinstance(callback, MetricAgreement) for callback in callbacks):
        callbacks.insert(0, MetricAgreement())


def _alone() -> bool:
    return False
