"""The estimators' optimizers: one per factory, one parameter group per boundary."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_dni.core.boundary import choose_by_pattern
from lightning_dni.core.estimator import Installed
from lightning_dni.errors import EstimatorError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class EstimatorOptimizers:
    """Optimizers that grow as estimators are built.

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
        self._boundaries: set[str] = set()

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._optimizers.values())

    def add(self, boundary: str, installed: Installed) -> None:
        """Take over the parameters of the estimator at `boundary`."""
        if boundary in self._boundaries or not installed.parameters:
            return
        self._boundaries.add(boundary)
        factory = self._factories[boundary]
        group = {"params": list(installed.parameters), "boundary": boundary}
        if id(factory) in self._optimizers:
            self._optimizers[id(factory)].add_param_group(group)
            return
        optimizer = factory([group])
        if not isinstance(optimizer, Optimizer):
            raise EstimatorError(
                f"Expected `estimator_optimizer` to make a torch optimizer from parameters, but got "
                f"{type(optimizer).__name__}. Pass partial(torch.optim.Adam, lr=...), for example."
            )
        self._optimizers[id(factory)] = optimizer

    def step(self) -> None:
        """Take one step with the gradients that are there, and clear them."""
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """One state per optimizer, in the order in which they were made."""
        return [optimizer.state_dict() for optimizer in self._optimizers.values()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Load what `state_dict` gave, into the same estimators.

        Raises:
            EstimatorError: The number of optimizers differs.
        """
        if len(states) != len(self._optimizers):
            raise EstimatorError(
                f"Expected {len(self._optimizers)} states of estimator optimizers, but got "
                f"{len(states)}. Resume with the `estimator_optimizer` of the saved run."
            )
        for optimizer, state in zip(self._optimizers.values(), states, strict=True):
            optimizer.load_state_dict(state)
