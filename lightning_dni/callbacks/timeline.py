"""PipelineTimeline: a picture of who computed what when, over a few steps of a pipeline."""

from statistics import median
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_dni.callbacks._compat import rank_zero_info, rank_zero_warn
from lightning_dni.callbacks.engine import engine_of
from lightning_dni.callbacks.gantt import FILE_NAME, draw_timeline
from lightning_dni.callbacks.pictures import picture_path, write_figure
from lightning_dni.callbacks.wandb_report import WandbReport
from lightning_dni.pipeline.clock import Span
from lightning_dni.pipeline.staged import StagedEngine

Recording = tuple[int, list[float], list[Span]]
"""A stage, its clock at moments that all stages share, and what it did."""

ROUNDS = 7
"""Times at which all processes look at their clocks together."""


class PipelineTimeline(pl.Callback):
    """Records what every stage does in a few steps, and draws it at the end of fit.

    The picture goes into the log directory as `dni_timeline.png`, and to W&B. Under a strategy without
    stages the callback does nothing. Times are those of each process; on an accelerator a kernel's time is
    seen where the process waits for it. Clocks of different hosts are compared at the end, when all
    processes leave several barriers together: they agree to within the latency of a message.

    Args:
        first_step: Optimizer step with which to begin; the first ones are slower than the others.
        steps: Number of optimizer steps to record.

    Raises:
        ValueError: `first_step` is negative, or `steps` is below one.
    """

    def __init__(self, first_step: int = 20, steps: int = 6) -> None:
        for name, value, least in (("first_step", first_step, 0), ("steps", steps, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Expected `{name}` to be an integer of at least {least}, but got {value!r}. It counts "
                    "optimizer steps."
                )
        self._first, self._steps = first_step, steps
        self._engine: StagedEngine | None = None
        self._spans: list[Span] = []
        self._wandb: WandbReport | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the stage."""
        engine = engine_of(trainer, self, exact=True)
        self._engine = engine if isinstance(engine, StagedEngine) else None
        self._spans = []
        self._wandb = WandbReport(trainer)
        if self._engine is None:
            rank_zero_info(
                f"PipelineTimeline draws the stages of a pipeline, and {type(trainer.strategy).__name__} has "
                "none: it does nothing."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to record, or stop."""
        if self._engine is None:
            return
        inside = 0 <= trainer.global_step - self._first < self._steps
        if inside and self._engine.clock.spans is None and not self._spans:
            self._engine.clock.record()
        elif not inside:
            self._stop()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what all stages have recorded."""
        if self._engine is None:
            return
        self._stop()
        found = self._gather(trainer, self._engine)
        stages = _on_one_clock(found)
        if not any(stages.values()):
            rank_zero_warn(
                f"PipelineTimeline recorded nothing: fit ended at step {trainer.global_step}, and it waits "
                f"for step {self._first}. Pass a smaller `first_step`."
            )
            return
        path = picture_path(trainer, FILE_NAME)
        if path is not None:
            write_figure(draw_timeline(stages), path)
            rank_zero_info(f"PipelineTimeline has drawn who computed what when: {path}")
        assert self._wandb is not None
        self._wandb.show_timeline(stages, trainer.global_step - 1)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            self._engine.clock.take()
        self._engine = self._wandb = None

    def _stop(self) -> None:
        assert self._engine is not None
        self._spans = self._spans or self._engine.clock.take()

    def _gather(self, trainer: pl.Trainer, engine: StagedEngine) -> list[Recording]:
        """What every process has recorded, in all of them."""
        strategy, marks = trainer.strategy, list[float]()
        for _ in range(ROUNDS):
            strategy.barrier("PipelineTimeline")
            marks.append(perf_counter())
        mine: Recording = (engine.stage, marks, self._spans)
        return [strategy.broadcast(mine, src=rank) for rank in range(trainer.world_size)]


def _on_one_clock(found: list[Recording]) -> dict[int, list[Span]]:
    """The spans of every stage, upwards, on the clock of rank 0."""
    _, reference, _ = found[0]
    stages: dict[int, list[Span]] = {}
    for stage, marks, spans in sorted(found, key=lambda each: each[0]):
        ahead = median(mine - other for mine, other in zip(marks, reference, strict=True))
        stages[stage] = [s._replace(start=s.start - ahead, end=s.end - ahead) for s in spans]
    return stages
