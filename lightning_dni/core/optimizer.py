"""The estimators' optimizers, their schedules and their clipping."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_dni.core.boundary import choose_factories
from lightning_dni.core.estimator import Installed
from lightning_dni.errors import EstimatorError

EXAMPLE = "partial(torch.optim.Adam, lr=1e-3)"

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]


@runtime_checkable
class Trained(Protocol):
    """Something with parameters that are trained."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """These."""


class EstimatorOptimizers:
    """One optimizer per factory, over the estimators that were built at the same time.

    Their parameters share a group, which names its `boundaries`: fused and vectorized optimizers then work
    on all of them at once. An estimator built later, for a stage that was thawed, gets an optimizer of its
    own, whose schedule starts then.

    Args:
        factory: Makes an optimizer from parameter groups, or {boundary pattern: such a factory};
            boundaries that share a factory share an optimizer.
        boundaries: Names of all boundaries.
        schedule: Makes a learning-rate scheduler from an optimizer; None for constant rates.
        clip_norm: Norm to which the gradients of each estimator are clipped; None for no clipping.
        argument: What the user calls `factory`, for errors.

    Attributes:
        clip_norm: The same.

    Raises:
        BoundaryError: No pattern matches a boundary.
        EstimatorError: `clip_norm` is not positive.
    """

    def __init__(
        self,
        factory: OptimizerFactory | Mapping[str, OptimizerFactory],
        boundaries: Sequence[str],
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
        argument: str = "estimator_optimizer",
    ) -> None:
        if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
            raise EstimatorError(
                f"Expected `estimator_clip_norm` to be a norm above 0, or None, but got {clip_norm!r}."
            )
        self._factories = choose_factories(boundaries, factory, argument, EXAMPLE)
        if schedule is not None and not callable(schedule):
            raise EstimatorError(
                "Expected `estimator_scheduler` to be a class or a function that makes a scheduler from an "
                f"optimizer, but got {schedule!r}. Pass partial(StepLR, step_size=1000), for example."
            )
        self._schedule, self._argument = schedule, argument
        self.clip_norm = clip_norm
        self._optimizers: list[Optimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._owned: list[tuple[nn.Parameter, ...]] = []
        self._waiting: dict[str, Trained] = {}

    def __iter__(self) -> Iterator[Optimizer]:
        self.make()
        return iter(self._optimizers)

    def add(self, boundary: str, installed: Trained) -> None:
        """Take over the parameters of the estimator at `boundary`."""
        if installed.parameters:
            self._waiting[boundary] = installed

    def make(self) -> None:
        """Make the optimizers of the estimators added so far.

        Raises:
            EstimatorError: A factory makes something else.
        """
        if self._waiting:
            self._take_over(list(self._waiting))

    def _take_over(self, boundaries: Sequence[str]) -> None:
        """Make optimizers for the estimators that wait at `boundaries`, one per factory."""
        by_factory: dict[int, list[str]] = {}
        for name in boundaries:
            by_factory.setdefault(id(self._factories[name]), []).append(name)
        for names in by_factory.values():
            owned = [self._waiting.pop(name).parameters for name in names]
            group = {"params": [p for each in owned for p in each], "boundaries": names}
            optimizer = _make(self._factories[names[0]], group, self._argument)
            self._optimizers.append(optimizer)
            self._owned += owned
            if self._schedule is not None:
                self._schedulers.append(_schedule(self._schedule, optimizer))

    def part(
        self, fresh: "EstimatorOptimizers", installed: Mapping[str, Installed], boundaries: Collection[str]
    ) -> "EstimatorOptimizers":
        """Give `fresh` optimizers the state of these for the estimators at `boundaries`.

        Args:
            fresh: Without any estimator yet.
            installed: All estimators.
            boundaries: Those to take over.
        """
        self.make()
        for k, optimizer in enumerate(self._optimizers):
            names = [n for group in optimizer.param_groups for n in group["boundaries"] if n in boundaries]
            if not names:
                continue
            for name in names:
                fresh.add(name, installed[name])
            fresh.make()
            for old, new in zip(optimizer.param_groups, fresh._optimizers[-1].param_groups, strict=True):
                new |= {key: value for key, value in old.items() if key not in ("params", "boundaries")}
                kept = {p: optimizer.state[p] for p in new["params"] if p in optimizer.state}
                fresh._optimizers[-1].state.update(kept)
            if self._schedulers:
                fresh._schedulers[-1].load_state_dict(self._schedulers[k].state_dict())
        return fresh

    def step(self) -> None:
        """Take one step with the gradients that are there, clipped where asked, and clear them."""
        self.make()
        if self.clip_norm is not None:
            for parameters in self._owned:
                nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
        self.zero_grad()

    def advance(self) -> None:
        """Move every schedule on by a step."""
        for scheduler in self._schedulers:
            scheduler.step()

    def zero_grad(self) -> None:
        """Forget the gradients (`Optimizer.zero_grad` spends more on being profiled)."""
        for parameters in self._owned:
            for parameter in parameters:
                parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """One state per optimizer with its `kind`, in the order in which they were made."""
        self.make()
        return [{"kind": type(each).__name__, **each.state_dict()} for each in self._optimizers]

    def schedules(self) -> list[dict[str, Any]]:
        """One state per scheduler with its `kind`, in the same order."""
        return [{"kind": type(each).__name__, **each.state_dict()} for each in self._schedulers]

    def load_schedules(self, states: Sequence[dict[str, Any]]) -> None:
        """Load what `schedules` gave, after the optimizers' states.

        Raises:
            EstimatorError: There are other schedules here.
        """
        here, saved = [type(each).__name__ for each in self._schedulers], [state["kind"] for state in states]
        if here != saved:
            raise EstimatorError(
                f"Expected schedules of estimator optimizers of kinds {here}, but got {saved}. Resume with "
                "the `estimator_scheduler` of the saved run."
            )
        for scheduler, state in zip(self._schedulers, states, strict=True):
            scheduler.load_state_dict({key: value for key, value in state.items() if key != "kind"})

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Load what `state_dict` gave, into optimizers over the same estimators, none of them made yet.

        Raises:
            EstimatorError: The estimators are others, or share optimizers in another way.
        """
        saved = [name for state in states for group in state["param_groups"] for name in group["boundaries"]]
        if sorted(saved) != sorted(self._waiting):
            raise EstimatorError(
                f"Expected optimizer states for the estimators at {sorted(self._waiting)}, but got them for "
                f"{sorted(saved)}. Resume with the `estimator` of the saved run."
            )
        for state in states:
            for group in state["param_groups"]:
                self._take_over(group["boundaries"])
        if len(states) != len(self._optimizers):
            raise EstimatorError(
                f"Expected {len(self._optimizers)} states of estimator optimizers, but got {len(states)}. "
                "Resume with the `estimator_optimizer` of the saved run."
            )
        for optimizer, state in zip(self._optimizers, states, strict=True):
            if type(optimizer).__name__ != state["kind"]:
                raise EstimatorError(
                    f"Expected the state of the estimators' {type(optimizer).__name__}, but got that of "
                    f"{state['kind']}. Resume with the `estimator_optimizer` of the saved run."
                )
            optimizer.load_state_dict({key: value for key, value in state.items() if key != "kind"})


def _make(factory: OptimizerFactory, group: dict[str, Any], argument: str) -> Optimizer:
    optimizer = factory([group])
    if not isinstance(optimizer, Optimizer):
        raise EstimatorError(
            f"Expected `{argument}` to make a torch optimizer from parameters, but got "
            f"{type(optimizer).__name__}. Pass partial(torch.optim.Adam, lr=...), for example."
        )
    if isinstance(optimizer, LBFGS):
        raise EstimatorError(
            f"Expected `{argument}` to make an optimizer that steps without a closure, but got LBFGS. Pass "
            "partial(torch.optim.Adam, lr=...), for example."
        )
    return optimizer


def _schedule(factory: ScheduleFactory, optimizer: Optimizer) -> LRScheduler:
    scheduler = factory(optimizer)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise EstimatorError(
            "Expected `estimator_scheduler` to make a torch scheduler that steps without a metric, but got "
            f"{type(scheduler).__name__}. Pass partial(StepLR, step_size=1000), for example."
        )
    return scheduler
