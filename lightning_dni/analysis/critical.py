"""Critical points: is one stationary for net and synthetic gradient jointly, and can the latter be exact?"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_dni.analysis.linear import fit_linear_map
from lightning_dni.core import Feedback, GradientEstimator, Record
from lightning_dni.core.distance import difference_sums, norm_quotient
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator
from lightning_dni.estimators.conditioning import Conditioning

RowLosses = Callable[[Tensor], Tensor]
"""The loss of every row `[rows]`, as a function of the network's output."""


class Stationarity(NamedTuple):
    """How far a point is from being critical, in units of the mean loss of a row (section 3).

    The first three are the conditions of a joint critical point; the last is that of the original problem,
    which together with the first makes its critical points.

    Attributes:
        above: Norm of the loss's gradient in the weights above the boundary.
        below: Norm of what the synthetic gradient gives to the weights below.
        estimator: Norm of the SG loss's gradient in the estimator's weights.
        below_true: Norm of the loss's gradient in the weights below.
    """

    above: Tensor
    below: Tensor
    estimator: Tensor
    below_true: Tensor

    @property
    def joint(self) -> Tensor:
        """The largest of the three conditions: zero at a critical point of the joint system."""
        return torch.stack([self.above, self.below, self.estimator]).amax()

    @property
    def original(self) -> Tensor:
        """The same of the original problem: zero at a point that is critical for backprop."""
        return torch.stack([self.above, self.below_true]).amax()


def stationarity(
    below: nn.Module,
    above: nn.Module,
    estimator: GradientEstimator | None,
    x: Tensor,
    context: Tensor | None,
    losses: RowLosses,
) -> Stationarity:
    """The residuals of the three stationarity conditions at a point, by autograd.

    Args:
        below: What lies below the boundary; gives one tensor.
        above: What lies above it.
        estimator: Supplies the gradient at it; None for backprop, whose `below` is `below_true`.
        x: The inputs.
        context: What the estimator is told, as it expects it.
        losses: The loss.
    """
    h = below(x)
    cut = h.detach().requires_grad_()
    mean = losses(above(cut)).mean()
    upper = list(above.parameters())
    at_h, *up = torch.autograd.grad(mean, [cut, *upper], allow_unused=True, materialize_grads=True)
    target = at_h * len(h)
    given, learnt = (target, []) if estimator is None else _judge(estimator, cut.detach(), context, target)
    lower = list(below.parameters())
    down, true = (
        torch.autograd.grad(
            h, lower, g / len(h), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for g in (given, target)
    )
    return Stationarity(*(_norm(found, h) for found in (up, down, learnt, true)))


def representation_error(
    estimator: GradientEstimator,
    h: Float[Tensor, " rows *features"],
    context: Tensor | None,
    gradient: Float[Tensor, " rows *features"],
    iterations: int = 200,
) -> Float[Tensor, ""]:
    """How near any estimator of this class comes to `gradient` at these rows, over the norm of it.

    Proposition 1 keeps a critical point where this is zero. For `LinearEstimator` on vectors it is exact:
    least squares. For any other it is the least that L-BFGS has found from the weights which the estimator
    has, hence an upper bound: zero proves that the class holds the gradient, more than that proves nothing.
    The estimator itself is left as it is.

    Args:
        estimator: Of the class in question.
        h: Activations.
        context: What the estimator is told.
        gradient: The gradient to represent, in units of the per-row loss.
        iterations: Of L-BFGS.

    Raises:
        EstimatorError: The estimator has nothing that could be fitted to a gradient.
    """
    if isinstance(estimator, LinearEstimator) and h.ndim == 2:
        labels = _as_vectors(estimator.conditioning, estimator.num_classes, context, h)
        fitted = fit_linear_map(h, labels, gradient)(h, labels)
        return norm_quotient(*difference_sums(fitted, gradient)).to(h.dtype)
    if not estimator.regresses or not estimator.is_learned:
        raise EstimatorError(
            f"Expected an estimator that learns the gradient itself, but got {type(estimator).__name__}. "
            "Pass one whose class says `regresses`."
        )
    fitted = _minimize(copy.deepcopy(estimator).to(h.dtype), h, context, gradient, iterations)
    return norm_quotient(*difference_sums(fitted, gradient)).to(h.dtype)


def _minimize(
    estimator: GradientEstimator, h: Tensor, context: Tensor | None, gradient: Tensor, iterations: int
) -> Tensor:
    # the last layer starts at zero, where hidden layers have no gradient; L-BFGS gets away from there
    optimizer = torch.optim.LBFGS(
        estimator.parameters(),
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = estimator.loss(_ask(estimator, h, context), Feedback(target=(gradient,)))
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
    said = _ask(estimator, h, context).gradient
    return torch.zeros_like(h) if said is None else said[0].detach()


def _judge(
    estimator: GradientEstimator, h: Tensor, context: Tensor | None, target: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What the estimator gives at `h`, and the gradients of its loss in its weights."""
    record = _ask(estimator, h, context)
    given = torch.zeros_like(h) if record.gradient is None else record.gradient[0].detach()
    loss = estimator.loss(record, Feedback(target=(target,)))
    return given, [] if loss is None else _gradients(loss, estimator)


def _ask(estimator: GradientEstimator, h: Tensor, context: Tensor | None) -> Record:
    gradient, state = estimator.synthesize((h,), context, None)
    return Record((h,), context, gradient, state)


def _as_vectors(
    conditioning: Conditioning, num_classes: int | None, context: Tensor | None, h: Tensor
) -> Tensor:
    """The context as vectors that the linear map multiplies."""
    if conditioning.weight is None or context is None:
        return h.new_zeros(len(h), 0)
    if num_classes is None:
        return context.to(h.dtype)
    return nn.functional.one_hot(context.long(), num_classes).to(h.dtype)


def _gradients(loss: Tensor, estimator: nn.Module) -> list[Tensor]:
    parameters = list(estimator.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return list(found)


def _norm(tensors: "list[Tensor] | tuple[Tensor, ...]", like: Tensor) -> Tensor:
    squares = [t.square().sum() for t in tensors]
    return torch.stack(squares).sum().sqrt() if squares else like.new_zeros(())
