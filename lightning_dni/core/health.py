"""Whether what went into a step is finite, looked at when the device may be waited for."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Installed
from lightning_dni.errors import EstimatorError, StageError

OnNonfinite = Literal["raise", "skip"]
"""What happens to an estimator's gradient that is not finite: an error, or no update in that step."""

Agree = Callable[[list[bool]], list[bool]]
"""Makes every process know whether all of them said yes, for each question."""


class Observation(NamedTuple):
    """A scalar that is finite if everything that went into it was.

    Attributes:
        step: The engine's step.
        value: The scalar, on the model's device.
        what: "loss", "gradient" (synthetic) or "lesson" (an estimator's loss).
        boundary: Where it was made; None for the loss.
        installed: The estimator that made it; None for the loss.
    """

    step: int
    value: Tensor
    what: Literal["loss", "gradient", "lesson"]
    boundary: str | None = None
    installed: Installed | None = None


class Health:
    """Observations that nobody has looked at yet, and what was skipped so far.

    Args:
        on_nonfinite: "raise" or "skip".
        boundaries: Names of the boundaries.

    Attributes:
        skipped: Number of skipped estimator updates by boundary; empty where none can be.

    Raises:
        EstimatorError: `on_nonfinite` is something else.
    """

    def __init__(self, on_nonfinite: OnNonfinite, boundaries: Iterable[str]) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise EstimatorError(
                f"Expected `on_nonfinite` to be 'raise' or 'skip', but got {on_nonfinite!r}."
            )
        self.skips = on_nonfinite == "skip"
        self.skipped = dict.fromkeys(boundaries, 0) if self.skips else {}
        self._unread: list[Observation] = []

    def observe(self, step: int, loss: Tensor | None, cuts: Sequence[Cut]) -> None:
        """Keep a scalar of everything in a step that must be finite; `cuts` topmost first."""
        estimators = [] if self.skips else list(reversed(cuts))
        gradients = [(c, c.said) for c in estimators if c.said is not None]
        lessons = [(c, c.learnt) for c in estimators if c.learnt is not None]
        # in the order in which one follows from the other: the first that is not finite is the cause
        self._unread += [Observation(step, v, "gradient", c.boundary, c.installed) for c, v in gradients]
        if loss is not None:
            self._unread.append(Observation(step, loss, "loss"))
        self._unread += [Observation(step, v, "lesson", c.boundary, c.installed) for c, v in lessons]

    def look(self) -> None:
        """Look at what was observed since the last look; waits for an accelerator, once.

        Raises:
            EstimatorError: An estimator gave, or learns from, something that is not finite.
            StageError: A loss is not finite.
        """
        unread, self._unread = self._unread, []
        values = _numbers([each.value for each in unread])
        for each, value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise _error(each, value)

    def sift(self, cuts: Sequence[Cut], keep_stage: bool, agree: Agree | None = None) -> None:
        """Take away the gradients of a step that are not finite, of estimators and of stages that got them.

        Args:
            cuts: The cuts that count.
            keep_stage: Leave the stages' gradients, for a gradient scaler to find.
            agree: Makes all processes decide alike.
        """
        asked = [(c, v) for c in cuts for v in (c.said, c.learnt)]
        numbers = iter(_numbers([v for _, v in asked if v is not None]))
        finite = [v is None or math.isfinite(next(numbers)) for _, v in asked]
        finite = finite if agree is None else agree(finite)
        for cut, said, learnt in zip(cuts, finite[::2], finite[1::2], strict=True):
            if not said and not keep_stage and cut.bp_lambda < 1.0:
                cut.param_grads = []
            if not (said and learnt):
                self.skipped[cut.boundary] = self.skipped.get(cut.boundary, 0) + 1
                cut.estimator_grads, cut.lesson = [], None


def _numbers(values: Sequence[Tensor]) -> list[float]:
    if all(v.device.type == "cpu" for v in values):
        return [v.item() for v in values]
    first = values[0].device
    return torch.stack([v.to(first, torch.float32) for v in values]).tolist()


def _error(seen: Observation, value: float) -> EstimatorError | StageError:
    if seen.installed is None:
        return StageError(
            f"Expected a finite loss, but got {value} in step {seen.step}, from synthetic gradients "
            "that are finite. Look at the data and the loss, or lower the learning rate of the network."
        )
    who = f"{type(seen.installed.estimator).__name__} at boundary {seen.boundary!r}"
    skip = "or pass on_nonfinite='skip' to leave out such updates"
    if seen.what == "lesson":
        return EstimatorError(
            f"Expected a finite target gradient for {who}, but got one that is not (or is too large to be "
            f"squared) in step {seen.step}. Lower the learning rate of the network, {skip}."
        )
    if all(bool(p.isfinite().all()) for p in seen.installed.estimator.parameters()):
        return EstimatorError(
            f"Expected {who} to give finite gradients, but got some that are not in step {seen.step}, "
            "from finite parameters: the activation there is not finite, or too large. Lower the learning "
            f"rate of the network, or of `estimator_optimizer`, {skip}."
        )
    return EstimatorError(
        f"Expected {who} to give finite gradients, but got some that are not in step {seen.step}: its "
        f"parameters are no longer finite. Lower the learning rate of `estimator_optimizer`, {skip}."
    )
