"""The estimators' optimizers: one per factory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_dni.core.boundary import choose_by_pattern
from lightning_dni.core.estimator import Installed
from lightning_dni.errors import EstimatorError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class EstimatorOptimizers:
    """One optimizer per factory, over the estimators built so far.

    Estimators built between two steps share a parameter group, which names its `boundaries`; fused and
    vectorized optimizers then work on all of them at once.

    Args:
        factory: Makes an optimizer from parameter groups, or {boundary pattern: such a factory};
            boundaries that share a factory share an optimizer.
        boundaries: Names of all boundaries.

    Raises:
        BoundaryError: No pattern matches a boundary.
    """

    def __init__(
        self, factory: OptimizerFactory | Mapping[str, OptimizerFactory], boundaries: Sequence[str]
    ) -> None:
        self._factories = {n: choose_by_pattern(n, factory, "estimator_optimizer") for n in boundaries}
        self._optimizers: dict[int, Optimizer] = {}
        self._waiting: dict[str, Installed] = {}

    def __iter__(self) -> Iterator[Optimizer]:
        self.make()
        return iter(self._optimizers.values())

    def add(self, boundary: str, installed: Installed) -> None:
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
        """Give the estimators that wait at `boundaries` to their optimizers, one group for each."""
        by_factory: dict[int, list[str]] = {}
        for name in boundaries:
            by_factory.setdefault(id(self._factories[name]), []).append(name)
        for key, names in by_factory.items():
            parameters = [p for name in names for p in self._waiting.pop(name).parameters]
            group = {"params": parameters, "boundaries": names}
            if key in self._optimizers:
                self._optimizers[key].add_param_group(group)
            else:
                self._optimizers[key] = _make(self._factories[names[0]], group)

    def step(self) -> None:
        """Take one step with the gradients that are there, and clear them."""
        for optimizer in self:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients (`Optimizer.zero_grad` spends more on being profiled)."""
        for optimizer in self:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """One state per optimizer, in the order in which they were made."""
        return [optimizer.state_dict() for optimizer in self]

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
        for optimizer, state in zip(self._optimizers.values(), states, strict=True):
            optimizer.load_state_dict(state)


def _make(factory: OptimizerFactory, group: dict[str, Any]) -> Optimizer:
    optimizer = factory([group])
    if not isinstance(optimizer, Optimizer):
        raise EstimatorError(
            f"Expected `estimator_optimizer` to make a torch optimizer from parameters, but got "
            f"{type(optimizer).__name__}. Pass partial(torch.optim.Adam, lr=...), for example."
        )
    return optimizer
