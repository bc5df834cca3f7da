"""What holds for one whole training step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dni.core.estimator import rows_of
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.immediate import ImmediateUpdates
from lightning_dni.core.inputs import Crossed, SyntheticInputs, not_finite
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.target import Denominator, denominator
from lightning_dni.errors import EstimatorError

Scale = Tensor | Callable[[], Tensor]
"""What a gradient scaler multiplies the loss with, as it is, or as it will be when it is asked."""


@dataclass(frozen=True)
class StepSettings:
    """What holds for one whole step.

    Attributes:
        batch: The user's batch, for a callable `loss_denominator`.
        context: What was found in it for the estimators.
        bp_lambda: Lambda of BP(lambda) by boundary.
        loss_denominator: What the user's loss is divided by.
        elements_per_row: Elements of the network's output per row, if one was seen before this step.
        accumulate: Number of forward passes whose losses the user averages.
        scale: What a gradient scaler multiplies the loss with, or a callable that gives it; None for one.
        report: Keep gradients for the report.
        probe: Keep graphs for the true gradients.
        instruments: What else is measured on them.
        check_values: Look at labels and synthetic gradients, which waits for an accelerator.
        keep_lessons: Keep what the estimators learnt from, for further steps on it.
        skips: Whether what is not finite is left out.
        own_parameters: The parameters of a boundary's module, where not every boundary need run.
        exchange: Averages the gradients of this step over replicas; None where nothing is exchanged.
        asleep: The boundaries (and `LAST_STAGE`) whose stage sits this step out.
        updates: Updates stages as soon as their gradients are there; None: all wait for the end.
        inputs: Predicts what a stage goes on from; None: that is what the one below has made.

    Raises:
        EstimatorError: `accumulate` is below one.
    """

    batch: Any
    context: Tensor | None
    bp_lambda: Mapping[str, float]
    loss_denominator: Denominator = "batch"
    elements_per_row: int | None = None
    accumulate: int = 1
    scale: Scale | None = None
    report: bool = False
    probe: bool = False
    instruments: Sequence[Instrument] = ()
    check_values: bool = True
    keep_lessons: bool = False
    skips: bool = False
    own_parameters: Callable[[str], Iterable[Tensor]] | None = None
    exchange: Exchange | None = None
    asleep: frozenset[str] = frozenset()
    updates: ImmediateUpdates | None = None
    inputs: SyntheticInputs | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise EstimatorError(f"Expected `accumulate` to be at least 1, but got {self.accumulate}.")

    @property
    def loss_scale(self) -> float | Tensor:
        """What the loss is multiplied with by a gradient scaler; one without."""
        scale = self.scale() if callable(self.scale) else self.scale
        return 1.0 if scale is None else scale

    @property
    def counts_elements(self) -> bool:
        """Whether the denominator is only known once the network's output was seen."""
        return self.loss_denominator == "elements" and self.elements_per_row is None

    def cross(self, boundary: str, outputs: Sequence[Tensor], calls: int) -> Crossed:
        """What passes on in place of `outputs` of the boundary, which has run `calls` times in this step.

        Raises:
            EstimatorError: It is to be predicted, and cannot be, or is not finite.
        """
        if self.inputs is None or not self.inputs.covers(boundary):
            return Crossed([h.detach().requires_grad_() for h in outputs])
        learns, share = boundary not in self.asleep, 1.0 / self.accumulate
        crossed = self.inputs.cross(boundary, outputs, calls, learns, share, self.report)
        looks = self.skips or (self.check_values and self.scale is None)
        if looks and crossed.loss is not None and not bool(crossed.loss.isfinite()):
            if not self.skips:
                raise not_finite(boundary)
            crossed.gradients = []
        return crossed

    def factor(self, h: Sequence[Tensor], value: Any, elements_per_row: int | None) -> float | Tensor:
        """What turns a gradient in units of the per-row loss into one of the user's scaled loss."""
        factor = self.share(h, value, elements_per_row)
        return (
            factor if self.scale is None else factor * (self.scale() if callable(self.scale) else self.scale)
        )

    def share(self, h: Sequence[Tensor], value: Any, elements_per_row: int | None) -> float | Tensor:
        """The same for the loss as it is before a gradient scaler multiplies it."""
        divisor = denominator(self.loss_denominator, self.batch, value, rows_of(h), elements_per_row)
        return 1.0 / (divisor * self.accumulate)
