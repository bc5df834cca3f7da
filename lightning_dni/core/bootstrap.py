"""What estimators at truncations learn, once the next chunk has come back or will never come."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dni.core.chunk import Chunk
from lightning_dni.core.cut import Lesson
from lightning_dni.core.estimator import Feedback, Gradient, Installed, Record, who
from lightning_dni.core.health import Health
from lightning_dni.core.report import BoundaryReport, with_rows_of
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.stage import accumulate, local_gradients
from lightning_dni.core.synthesis import check_graph, learn
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError

Install = Callable[[str, Sequence[Tensor]], Installed]
"""Gives the estimator of a truncation, building it from its first state."""
SequenceEnd = Literal["zero", "ignore"]
"""What is taught about a state from which nobody goes on: that its gradient is zero, or nothing."""


class Bootstrap:
    """The lessons of the estimators of one engine.

    Args:
        health: Hears of everything that has to be finite.
        sequence_end: What rows teach that do not go on.

    Attributes:
        reports: What was said beside what came back, of the step in progress, by truncation.

    Raises:
        EstimatorError: `sequence_end` is something else.
    """

    def __init__(self, health: Health, sequence_end: SequenceEnd) -> None:
        if sequence_end not in ("zero", "ignore"):
            raise EstimatorError(
                f"Expected `sequence_end` to be 'zero' or 'ignore', but got {sequence_end!r}."
            )
        self._health, self.sequence_end = health, sequence_end
        self._seen: list[tuple[Tensor, Literal["gradient", "lesson"], str, Installed]] = []
        self.reports: dict[str, BoundaryReport] = {}

    def begin_step(self) -> None:
        """Forget what belongs to the last step."""
        self.reports, self._seen = {}, []

    def teach(
        self,
        name: str,
        installed: Installed,
        record: Record,
        target: Gradient,
        rows: Tensor,
        future: Gradient | None,
        settings: StepSettings,
    ) -> Lesson | None:
        """Add the gradients of the estimator's loss to its parameters.

        Its parameters have moved since `record` was made, so the prediction is made again.

        Args:
            name: The truncation.
            installed: Its estimator.
            record: What it saw and said at the end of the chunk before.
            target: What has come back to the beginning of this one, in its units.
            rows: Which rows go on, `[batch]`.
            future: What it says at the end of this one; None for zero.
            settings: What holds for the step.

        Returns:
            What to learn from again.
        """
        ends = self.sequence_end == "zero"
        future = tuple(torch.zeros_like(t) for t in target) if future is None else future
        if ends:
            target, future = _where(rows, target), _where(rows, future)
        feedback = Feedback(
            target=target, row_weights=None if ends else rows.to(target[0].dtype), future=future
        )
        loss = self._learn(name, installed, record, feedback, settings)
        if settings.report:
            made = _report(record, target, rows, loss, installed)
            self.reports[name] = with_rows_of(self.reports.get(name), made)
        keeps = settings.keep_lessons and loss is not None
        return (installed, record, feedback, 1.0 / settings.accumulate) if keeps else None

    def _learn(
        self, name: str, installed: Installed, record: Record, feedback: Feedback, settings: StepSettings
    ) -> Tensor | None:
        if not installed.parameters:
            return None
        share = 1.0 / settings.accumulate
        loss = learn(installed, record, feedback, share)
        if loss is None:
            return None
        check_graph(loss, installed, who(installed.estimator, name))
        made = local_gradients([loss], None, installed.parameters)
        if not self.is_sound(loss.detach(), "lesson", name, installed, settings):
            return None
        accumulate(made)
        return loss.detach() / share

    def report_everywhere(self, chunks: Iterable[Chunk], install: Install) -> None:
        """Report on no row where there is nothing else: replicas add up what each of them reports.

        Args:
            chunks: Through which the loss has come back.
            install: Gives the estimator of a truncation.
        """
        for chunk in chunks:
            record = chunk.ends[0].ending.record
            if record is None or chunk.truncation in self.reports:
                continue
            installed = install(chunk.truncation, record.h)
            nothing = tuple(torch.zeros_like(h) for h in record.h)
            no_row = torch.zeros(len(nothing[0]), dtype=torch.bool, device=nothing[0].device)
            loss = nothing[0].new_zeros(()) if installed.parameters else None
            self.reports[chunk.truncation] = _report(record, nothing, no_row, loss, installed)

    def is_sound(
        self,
        value: Tensor,
        what: Literal["gradient", "lesson"],
        name: str,
        installed: Installed,
        settings: StepSettings,
    ) -> bool:
        """Whether to use that for which `value` stands; it is looked at later, where nothing is left out."""
        if self._health.skips or settings.scale is not None:
            return not self._health.leaves_out(value, name, installed)
        self._seen.append((value, what, name, installed))
        return True

    def watch(self, number: int) -> None:
        """Hand over what has to be finite in the step of that `number`."""
        for observation in self._seen:
            self._health.watch(number, *observation)
        self._seen = []


def _where(rows: Tensor, gradient: Gradient) -> Gradient:
    return tuple(torch.where(rows.view(-1, *[1] * (g.ndim - 1)), g, 0.0) for g in gradient)


def _report(
    record: Record, target: Gradient, rows: Tensor, loss: Tensor | None, installed: Installed
) -> BoundaryReport:
    """What was said beside what came back, in the rows that go on: to the others nothing has."""
    said = record.gradient or tuple(torch.zeros_like(t) for t in target)
    synthetic, heard = (torch.cat([g[rows].flatten(1) for g in each], dim=1) for each in (said, target))
    regresses = installed.estimator.regresses
    return BoundaryReport(
        synthetic=synthetic,
        target=heard,
        true=None,
        loss=sg_loss([synthetic], [heard]) if regresses and loss is not None else loss,
        regresses=regresses,
        applied_weights={},
        true_weights={},
    )
