"""The causal test of Proposition 2: the true gradient, with an error of a chosen size put in."""

from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_dni.core import BoundarySpec, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.core.randomness import derive_seed
from lightning_dni.errors import EstimatorError

Direction = Literal["random", "opposed"]


@final
class InjectedErrorEstimator(GradientEstimator):
    """What came back from above, plus an error of `relative_size` times its norm over the batch.

    It waits for the target gradient and learns nothing: a means to see what an error does, not to decouple.
    With one boundary the target is the true gradient; with several, errors add up on the way down.

    Args:
        spec: The boundary's spec.
        relative_size: Norm of the error over the norm of the gradient; 0 is backprop.
        direction: "random": normal, drawn anew for every call from a stream of its own. "opposed": against
            the gradient, the worst there is; above 1 the stage below climbs.
        seed: Of the stream.

    Raises:
        EstimatorError: The size is negative, or there is no such direction.
    """

    needs = frozenset({Signal.TARGET})
    locks = frozenset({Lock.UPDATE, Lock.BACKWARD})
    calls: Tensor

    def __init__(
        self, spec: BoundarySpec, relative_size: float, direction: Direction = "random", seed: int = 0
    ) -> None:
        super().__init__()
        if relative_size < 0 or direction not in ("random", "opposed"):
            raise EstimatorError(
                f"Expected `relative_size` of at least 0 and `direction` 'random' or 'opposed' for boundary "
                f"{spec.name!r}, but got {relative_size} and {direction!r}. Pass 0 for no error."
            )
        self._size, self._direction, self._key = relative_size, direction, (seed, spec.name)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing yet: the gradient comes with `correct`."""
        return None, None

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """The target gradient with the error."""
        target = feedback.target
        assert target is not None
        if self._direction == "opposed":
            return tuple(g * (1.0 - self._size) for g in target)
        generator = torch.Generator().manual_seed(derive_seed(self._key[0], self._key[1], int(self.calls)))
        self.calls += 1
        noise = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in target]
        ratio = self._size * _norm(target) / _norm(noise).to(target[0].device)
        return tuple(g + (n.to(g.device) * ratio).to(g.dtype) for g, n in zip(target, noise, strict=True))


def _norm(tensors: "list[Tensor] | Gradient") -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()
