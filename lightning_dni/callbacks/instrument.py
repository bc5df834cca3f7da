"""What all monitors share that have an instrument of their own run on probe steps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_dni.callbacks._compat import MisconfigurationException, forget_logged
from lightning_dni.callbacks.engine import engine_of
from lightning_dni.callbacks.rows import check_interval, warn_of_dropped_rows
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.report import BoundaryReport, Observable


class InstrumentMonitor(pl.Callback, ABC):
    """Has an instrument run every n-th optimizer step, and logs what it shows; abstract.

    The measured steps are those of `GradientMonitor` with the same interval, and share its probes.

    Args:
        every_n_train_steps: Optimizer steps from one measured step to the next.
        instrument: What is run at every boundary.

    Raises:
        ValueError: `every_n_train_steps` is not a positive integer.
    """

    def __init__(self, every_n_train_steps: int, instrument: Instrument) -> None:
        self._every_n = check_interval(every_n_train_steps)
        self._instrument = instrument
        self._engine: Observable | None = None
        self._due, self._step = False, 0
        self._logged: tuple[str, ...] = ()

    @abstractmethod
    def _observe(self, boundary: str, facts: BoundaryReport, measured: Mapping[str, Tensor]) -> None:
        """Take what was measured at a boundary in one micro-batch."""

    @abstractmethod
    def _row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Mapping[str, Tensor]:
        """What the micro-batches of a step have shown, by key; forgets them."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the engine.

        Raises:
            MisconfigurationException: The strategy has none, or one whose stages are in several processes.
        """
        engine = engine_of(trainer, self)
        if engine.probes_synchronously:
            raise MisconfigurationException(
                f"Expected a model in one process for {type(self).__name__}, but got "
                f"{type(trainer.strategy).__name__}, whose stages cannot show their graphs to each other. "
                f"Pass DNIStrategy or DNIDDPStrategy, or take {type(self).__name__} out of `callbacks`."
            )
        self._engine, self._due, self._logged = engine, False, ()
        warn_of_dropped_rows(trainer, self, self._every_n)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Request a probe for every batch of a step that is to be measured."""
        self._settle_row(trainer)
        self._step = trainer.global_step
        self._due = (self._step + 1) % self._every_n == 0
        if self._due:
            assert self._engine is not None
            self._engine.request_probe(self._instrument)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take what was measured; log at the end of the step."""
        if not self._due:
            return
        assert self._engine is not None
        report = self._engine.last_report
        for name, facts in {} if report is None else report.boundaries.items():
            if self._instrument in facts.measured:
                self._observe(name, facts, facts.measured[self._instrument])
        if trainer.global_step > self._step:
            row = dict(self._row(trainer, pl_module, batch))
            pl_module.log_dict(row, on_step=True, on_epoch=False)
            self._logged = tuple(row)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the last row from being written again."""
        self._settle_row(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the engine."""
        self._engine = None

    def _settle_row(self, trainer: pl.Trainer) -> None:
        if self._logged:
            forget_logged(trainer, self._logged)
            self._logged = ()
