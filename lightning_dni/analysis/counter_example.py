"""The one-dimensional example in which a weak synthetic gradient adds critical points (supplement A)."""

from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_dni.analysis.critical import Stationarity, stationarity
from lightning_dni.core import Feedback, Gradient, GradientEstimator, Record, sg_loss

DATA = (-2.0, -1.0, 1.0, 2.0)
"""The inputs. The model is f(x) = ax + b, the loss the sum of |f(x)|, least at a = b = 0."""

Module = Literal["constant", "sign", "none"]
"""What gives the gradient of every row: a trained constant c, c times the sign of f, or backprop."""


class Trajectory(NamedTuple):
    """A run of gradient descent, its start first.

    Attributes:
        parameters: a, b and c, `[steps + 1, 3]`.
        losses: The loss at each of them, `[steps + 1]`.
    """

    parameters: Tensor
    losses: Tensor


class Surface(NamedTuple):
    """The loss over a grid, for drawing.

    Attributes:
        a: Slopes, `[slopes]`.
        b: Offsets, `[offsets]`.
        loss: The loss, `[slopes, offsets]`.
        spurious: Where the constant module lets the net stand still and backprop would not; same shape.
    """

    a: Tensor
    b: Tensor
    loss: Tensor
    spurious: Tensor


def absolute_loss(a: Float[Tensor, "*grid"], b: Float[Tensor, "*grid"]) -> Float[Tensor, "*grid"]:
    """The sum over the data of |ax + b|; 6 |a| where |b| <= |a|."""
    return _outputs(a, b).abs().sum(-1)


def is_spurious(a: Float[Tensor, "*grid"], b: Float[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """Where a constant module that has converged says zero, although the loss has a gradient.

    The best constant is the mean of the true gradients sign(ax + b). It is zero where as many outputs are
    above as below zero, which is |b| < |a|; the net's loss has the gradient 6 sign(a) in a there.
    """
    signs = _outputs(a, b).sign()
    slope = (signs * a.new_tensor(DATA)).sum(-1)
    return (signs.mean(-1) == 0) & (slope != 0)


def loss_surface(reach: float = 3.5, points: int = 141) -> Surface:
    """The loss and the spurious region for slopes and offsets up to `reach`."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    return Surface(axis, axis, absolute_loss(a, b), is_spurious(a, b))


def descend(
    start: tuple[float, float, float],
    module: Module = "constant",
    steps: int = 4000,
    learning_rate: float = 0.02,
    decay: float = 0.998,
) -> Trajectory:
    """Gradient descent from (a, b, c), the net on what the module says, the module on its squared error.

    The synthetic gradient first learns from the true one, then both step at once from where they were.

    Args:
        start: a, b and c; without a module c stays.
        module: What gives the gradient.
        steps: Number of steps.
        learning_rate: Of the first step, for the net; the module's is half of it a row.
        decay: What the rates are multiplied with after each step.

    Raises:
        ValueError: There is no such module.
    """
    if module not in ("constant", "sign", "none"):
        raise ValueError(
            f"Expected `module` to be 'constant', 'sign' or 'none', but got {module!r}. Choose one of them."
        )
    x = torch.tensor(DATA, dtype=torch.float64)
    state = torch.tensor(start, dtype=torch.float64)
    states = [state]
    for step in range(steps):
        a, b, c = state
        true = (a * x + b).sign()
        basis = true if module == "sign" else torch.ones_like(x)
        given = true if module == "none" else c * basis
        miss = torch.zeros_like(x) if module == "none" else (c * basis - true) * basis
        gradient = torch.stack([(given * x).sum(), given.sum(), miss.sum()])
        state = state - learning_rate * decay**step * gradient
        states.append(state)
    parameters = torch.stack(states)
    return Trajectory(parameters, absolute_loss(parameters[:, 0], parameters[:, 1]))


def residuals_at(point: Float[Tensor, "3"], module: Module) -> Stationarity:
    """How far a, b and c are from a critical point, by autograd on torch modules.

    Nothing lies above the boundary, which is the output, so that `above` is zero. At a = b = 0, where the
    loss is least, it has a kink: a run that comes near ends beside it, at residuals that are not small.

    Args:
        point: a, b and c.
        module: What gives the gradient; with "none" c does not count.
    """
    below = nn.Linear(1, 1, device="meta", dtype=point.dtype).to_empty(device="cpu")
    with torch.no_grad():
        below.weight.copy_(point[0])
        below.bias.copy_(point[1])
    estimator = None if module == "none" else _Weak(point[2], sees_sign=module == "sign")
    x = point.new_tensor(DATA).unsqueeze(1)
    return stationarity(below, nn.Identity(), estimator, x, None, lambda f: f.abs().sum(1))


@final
class _Weak(GradientEstimator):
    """c for every row, or c times the sign of f."""

    regresses = True

    def __init__(self, c: Tensor, sees_sign: bool) -> None:
        super().__init__()
        self.c, self._sees_sign = nn.Parameter(c.clone()), sees_sign

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The same number for all rows, but for the sign."""
        return (self.c * (h[0].sign() if self._sees_sign else torch.ones_like(h[0])),), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """The SG loss."""
        assert record.gradient is not None
        assert feedback.target is not None
        return sg_loss(record.gradient, feedback.target)


def _outputs(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * a.new_tensor(DATA) + b.unsqueeze(-1)
