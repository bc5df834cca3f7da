"""BPLambdaScheduler: move lambda of BP(lambda) during training, as torch's schedulers move rates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import lightning.pytorch as pl
from typing_extensions import override

from lightning_dni.callbacks._compat import MisconfigurationException, row_interval
from lightning_dni.callbacks.engine import engine_of, key_of
from lightning_dni.core.report import Observable

Schedule = Callable[[int], float]
"""Gives lambda for the optimizer step of that number, counted from 0."""


@final
@dataclass(frozen=True)
class LinearWarmup:
    """From `start` to `end` in a straight line over `num_steps` steps, and `end` from then on.

    Args:
        num_steps: Number of the first step that has `end`.
        start: Lambda of step 0.
        end: Lambda of all steps from `num_steps`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> [LinearWarmup(num_steps=4)(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    num_steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_count("num_steps", self.num_steps)
        _check_lambda("start", self.start)
        _check_lambda("end", self.end)

    def __call__(self, step: int) -> float:
        """Lambda of optimizer step `step`."""
        if step >= self.num_steps:
            return float(self.end)
        return self.start + (self.end - self.start) * (step / self.num_steps)


@final
@dataclass(frozen=True)
class StepLambda:
    """`initial`, and from each milestone on the value it names.

    Args:
        milestones: {step: lambda from that step on}, in any order.
        initial: Lambda before the first milestone.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> [StepLambda({2: 0.5, 4: 0.0})(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    """

    milestones: dict[int, float]
    initial: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Mapping) or not self.milestones:
            raise ValueError(
                f"Expected `milestones` to be a non-empty mapping of step to lambda, but got "
                f"{self.milestones!r}. Pass {{1000: 0.5, 2000: 0.0}}, for example."
            )
        for step, value in self.milestones.items():
            _check_count(f"step {step!r} of milestones", step, minimum=0)
            _check_lambda(f"milestones[{step}]", value)
        _check_lambda("initial", self.initial)

    def __call__(self, step: int) -> float:
        """Lambda of optimizer step `step`."""
        passed = [milestone for milestone in self.milestones if milestone <= step]
        return float(self.milestones[max(passed)] if passed else self.initial)


@final
@dataclass(frozen=True)
class Alternation:
    """`synthetic_steps` steps on synthetic gradients, then one on true ones, and so on.

    A monitor whose period is a multiple of `synthetic_steps` + 1 only ever sees one kind of step.

    Args:
        synthetic_steps: Number of steps at lambda 0 between two steps at lambda 1.

    Raises:
        ValueError: `synthetic_steps` is not a positive integer.

    Example:
        >>> [Alternation(synthetic_steps=2)(step) for step in range(6)]
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    """

    synthetic_steps: int

    def __post_init__(self) -> None:
        _check_count("synthetic_steps", self.synthetic_steps)

    def __call__(self, step: int) -> float:
        """Lambda of optimizer step `step`."""
        return float(step % (self.synthetic_steps + 1) == self.synthetic_steps)


class BPLambdaScheduler(pl.Callback):
    """Sets the engine's `bp_lambda` before each optimizer step, from the Trainer's `global_step`.

    Logs `dni_bp_lambda/<boundary>` with every row that Lightning writes.

    Args:
        schedule: Lambda by step: `LinearWarmup`, `StepLambda`, `Alternation` or any callable; or
            {boundary or pattern: schedule}, where a boundary takes the first that matches and keeps
            the strategy's `bp_lambda` if none does.

    Attributes:
        last_step: The optimizer step that was scheduled last; -1 before the first.

    Raises:
        ValueError: `schedule` is no callable, or, in training, gives a value outside [0, 1].
        MisconfigurationException: When training starts under a strategy without an engine, or where
            a pattern matches no boundary.
    """

    def __init__(self, schedule: Schedule | dict[str, Schedule]) -> None:
        entries = schedule if isinstance(schedule, Mapping) else {"*": schedule}
        for pattern, entry in entries.items():
            if not callable(entry) or isinstance(entry, type):
                name = f"schedule[{pattern!r}]" if isinstance(schedule, Mapping) else "schedule"
                raise ValueError(
                    f"Expected `{name}` to be a callable of the step, but got {entry!r}. Pass "
                    "LinearWarmup(num_steps=1000), for example."
                )
        if not entries:
            raise ValueError(
                "Expected `schedule` to hold at least one schedule, but got an empty mapping. Pass "
                "{'*': LinearWarmup(num_steps=1000)}, for example."
            )
        self._schedules = dict(entries)
        self.last_step = -1
        self._last_lambda: dict[str, float] = {}
        self._engine: Observable | None = None
        self._stale = True

    def get_last_lambda(self) -> dict[str, float]:
        """The lambda of each boundary as it was set last; empty before the first step."""
        return dict(self._last_lambda)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the engine and check the schedules against its boundaries."""
        self._engine = engine_of(trainer, self)
        self._stale = True  # another engine, or one restored in the midst of an accumulated batch
        boundaries = list(self._engine.bp_lambda)
        for pattern in self._schedules:
            if not any(fnmatchcase(name, pattern) for name in boundaries):
                raise MisconfigurationException(
                    f"Expected the patterns in `schedule` to match boundaries, but {pattern!r} matches none "
                    f"of {boundaries}. Correct it, or leave it out."
                )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set lambda where a new step of the optimizer begins."""
        step = trainer.global_step
        if step == self.last_step and not self._stale:  # a further micro-batch of the same step
            return
        assert self._engine is not None
        self._last_lambda = self._engine.bp_lambda | self._scheduled(step)
        self._engine.set_bp_lambda(self._last_lambda)
        self.last_step, self._stale = step, False
        every = row_interval(trainer)
        if every and (step + 1) % every == 0:  # as Lightning counts: its row for this step comes after it
            values = {key_of("dni_bp_lambda", name): value for name, value in self._last_lambda.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the engine."""
        self._engine = None

    def _scheduled(self, step: int) -> dict[str, float]:
        assert self._engine is not None
        found: dict[str, float] = {}
        for name in self._engine.bp_lambda:
            for pattern, schedule in self._schedules.items():
                if fnmatchcase(name, pattern):
                    found[name] = _check_lambda(f"schedule({step})", schedule(step))
                    break
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        """The last step and its lambdas."""
        return {"last_step": self.last_step, "last_lambda": self.get_last_lambda()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved step."""
        self.last_step, self._last_lambda = state_dict["last_step"], dict(state_dict["last_lambda"])


def _check_count(name: str, value: object, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least {minimum}, but got {value!r}. It counts "
            "optimizer steps."
        )


def _check_lambda(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(
            f"Expected `{name}` to be a lambda in [0, 1], but got {value!r}. 0 is synthetic gradients only, "
            "1 is backprop."
        )
    return float(value)
