"""Whether what went into a step is finite, looked at when the device may be waited for."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Installed, who
from lightning_dni.core.exchange import Exchange
from lightning_dni.errors import EstimatorError, StageError

OnNonfinite = Literal["raise", "skip"]
"""What happens to an estimator's gradient that is not finite: an error, or no update in that step."""


MOST_UNREAD = 512
SKIP = "or pass on_nonfinite='skip' to leave out such updates"


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
        skipped: Number of estimator updates by boundary that left something out, be it one of several
            accumulated batches; empty where none can.

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
        self._suspects: dict[str, Installed] = {}
        self._counted: set[str] = set()

    @property
    def is_crowded(self) -> bool:
        """Whether so much was observed that somebody has to look."""
        return len(self._unread) > MOST_UNREAD

    def restart(self, skipped: Mapping[str, int]) -> None:
        """Drop what was observed and not looked at; go on counting from `skipped`."""
        self._unread.clear()
        self._suspects.clear()
        self._counted.clear()
        self.skipped.update(skipped)

    def end_update(self) -> None:
        """What is skipped from now on belongs to another update of the estimators."""
        self._counted.clear()

    def observe(self, step: int, loss: Tensor | None, cuts: Sequence[Cut]) -> None:
        """Keep a scalar of everything in a step that must be finite; `cuts` topmost first."""
        estimators = [] if self.skips else list(reversed(cuts))
        gradients = [(c, c.said) for c in estimators if c.said is not None]
        lessons = [(c, c.learnt) for c in estimators if c.learnt is not None]
        # in the order in which one follows from the other: the first that is not finite is the cause
        self._unread += [Observation(step, v, "gradient", c.boundary, c.installed) for c, v in gradients]
        if loss is not None:
            self._unread.append(Observation(step, loss.sum() if loss.ndim else loss, "loss"))
        self._unread += [Observation(step, v, "lesson", c.boundary, c.installed) for c, v in lessons]

    def watch(
        self,
        step: int,
        value: Tensor,
        what: Literal["gradient", "lesson"],
        boundary: str,
        installed: Installed,
    ) -> None:
        """Keep one scalar that must be finite."""
        self._unread.append(Observation(step, value, what, boundary, installed))

    def leaves_out(self, value: Tensor, boundary: str, installed: Installed) -> bool:
        """Whether a scalar is not finite, which is counted; for who leaves out what it stands for."""
        if math.isfinite(*_numbers([value])):
            return False
        self._count(boundary)
        if not self.skips:
            self._suspects[boundary] = installed
        return True

    def look(self, exchange: Exchange | None = None, at_once: bool = False) -> None:
        """Look at what was observed since the last look; waits for an accelerator, once.

        Args:
            exchange: Lets every replica stop with the one that has found something; all have to look then.
            at_once: Whether no estimator has learnt since the observation, and its parameters tell.

        Raises:
            EstimatorError: An estimator gave, or learns from, something that is not finite.
            StageError: A loss is not finite, or another replica has found something.
        """
        unread, self._unread = self._unread, []
        values = _numbers([each.value for each in unread])
        pairs = zip(unread, values, strict=True)
        bad = next(((each, value) for each, value in pairs if not math.isfinite(value)), None)
        error = None if bad is None else _error(*bad, at_once)
        gone = next((name for name, made in self._suspects.items() if not _is_sound(made)), None)
        if error is None and gone is not None:
            error = _diverged(
                who(self._suspects[gone].estimator, gone), "a step that the gradient scaler has skipped"
            )
        self._suspects.clear()
        if (exchange is None or exchange.agree(error is None)) and error is None:
            return
        raise error or StageError(
            "Expected finite losses and gradients in every process, but got others in another one. "
            "See its message."
        )

    def sift(self, cuts: Sequence[Cut], keep_stage: bool) -> None:
        """Take away the gradients of a step that are not finite, of estimators and of stages that got them.

        Args:
            cuts: The cuts that count.
            keep_stage: Leave the stages' gradients, for a gradient scaler to find.
        """
        asked = [(c, v) for c in cuts for v in (c.said, c.learnt, c.applied)]
        numbers = iter(_numbers([v for _, v in asked if v is not None]))
        finite = [v is None or math.isfinite(next(numbers)) for _, v in asked]
        for cut, said, learnt, applied in zip(cuts, finite[::3], finite[1::3], finite[2::3], strict=True):
            if not keep_stage and not (applied if cut.waits else said):
                cut.param_grads = []
            if not (said and learnt):
                self._count(cut.boundary)
                cut.estimator_grads, cut.lesson = [], None
                if not self.skips:
                    self._suspects[cut.boundary] = cut.installed

    def _count(self, boundary: str) -> None:
        if boundary not in self._counted:
            self._counted.add(boundary)
            self.skipped[boundary] = self.skipped.get(boundary, 0) + 1


def _numbers(values: Sequence[Tensor]) -> list[float]:
    if not values or all(v.device.type == "cpu" for v in values):
        return [v.item() for v in values]
    first = values[0].device
    return torch.stack([v.to(first, torch.float32) for v in values]).tolist()


def _error(seen: Observation, value: float, at_once: bool) -> EstimatorError | StageError:
    if seen.installed is None or seen.boundary is None:
        return StageError(
            f"Expected a finite loss, but got {value} in step {seen.step}, from activations that are finite "
            "at every boundary, or were skipped. Look at the data and the loss, or lower the "
            "learning rate of the network."
        )
    name, when = who(seen.installed.estimator, seen.boundary), f"step {seen.step}"
    if seen.what == "lesson":
        return EstimatorError(
            f"Expected a finite target gradient for {name}, but got one that is not (or is too large to be "
            f"squared) in {when}. Lower the learning rate of the network, {SKIP}."
        )
    if not at_once:
        return EstimatorError(
            f"Expected {name} to give finite gradients, but got some that are not in {when}: the activation "
            "there is not finite, or the estimator had diverged. Lower the learning rate of the network, or "
            f"of `estimator_optimizer`, {SKIP}."
        )
    if _is_sound(seen.installed):
        return EstimatorError(
            f"Expected {name} to give finite gradients, but got some that are not in {when}, "
            "from finite parameters: the activation there is not finite, or too large. Lower the learning "
            f"rate of the network, or of `estimator_optimizer`, {SKIP}."
        )
    return _diverged(name, when)


def _diverged(name: str, when: str) -> EstimatorError:
    return EstimatorError(
        f"Expected {name} to give finite gradients, but got some that are not in {when}: its "
        f"parameters are no longer finite. Lower the learning rate of `estimator_optimizer`, {SKIP}."
    )


def _is_sound(installed: Installed) -> bool:
    return all(bool(p.isfinite().all()) for p in installed.estimator.parameters())
