"""Proposition 2: does the synthetic gradient track the true one well enough for its guarantee (section 4)?.

If at every iteration the error at the boundary is at most epsilon, the derivative of the activation in the
weights below has a norm of at most K, and for one delta in (0, 1)

    epsilon K <= ||dL/dtheta|| (1 - delta) / (1 + delta),

then training converges to a critical point of the original problem. The condition is sufficient, not
necessary: where it fails no guarantee holds, which does not say that training fails. What is measured here is
a surrogate: one step's own error and norm in place of bounds over the whole run, and for K the largest
singular value by power iteration, which comes near it from below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_dni.core.distance import norm_quotient, sum_dtype
from lightning_dni.core.instrument import Observation
from lightning_dni.errors import StageError


class TrackingCondition(NamedTuple):
    """The condition of Proposition 2 in one step, in units of the step's loss.

    Attributes:
        epsilon: Norm of the error of the gradient that was applied at the boundary, whole batch.
        jacobian_norm: K, the largest singular value of dh/dtheta, the rows of the batch below one another.
        gradient_norm: Norm of the true gradient of the weights.
    """

    epsilon: Tensor
    jacobian_norm: Tensor
    gradient_norm: Tensor

    @property
    def fraction(self) -> Tensor:
        """Epsilon K over the norm of the true gradient: the share that the condition wants below one.

        It bounds the relative error of the weights' gradient, `dni_weight_error`.
        """
        return norm_quotient((self.epsilon * self.jacobian_norm).square(), self.gradient_norm.square())

    @property
    def delta(self) -> Tensor:
        """The largest delta with which the condition holds; one that is not positive is not admissible."""
        return 2 / (1 + self.fraction) - 1

    @property
    def held(self) -> Tensor:
        """Whether there is an admissible delta."""
        return self.fraction < 1


@dataclass(frozen=True)
class TrackingInstrument:
    """Measures the parts of the condition at every boundary, for `engine.request_probe(instrument)`.

    Its figures are `epsilon_square`, `jacobian_square` and `scale` (that of a gradient scaler).
    `tracking_condition` makes the condition of them. Weights are those of the stage below the boundary,
    down to the next one.

    Args:
        iterations: Of the power iteration, at most.
        tolerance: It stops when an iteration changes K by less than this share.
    """

    iterations: int = 100
    tolerance: float = 1e-4

    def __call__(self, crossings: Sequence[Observation]) -> Mapping[str, Tensor]:
        """The figures of one boundary.

        Raises:
            StageError: The stage below cannot be differentiated twice over.
        """
        errors = [error for each in crossings for error in _errors(each)]
        weights = {id(v): v for each in crossings for v in each.variables if isinstance(v, nn.Parameter)}
        outputs = [h for each in crossings for h in each.outputs]
        try:
            norm = largest_singular_value(
                outputs, list(weights.values()), iterations=self.iterations, tolerance=self.tolerance
            )
        except RuntimeError as error:
            raise StageError(
                f"Expected the stage below boundary {crossings[0].boundary!r} to have second derivatives, "
                f"from which the power iteration takes the norm of dh/dtheta, but got: {error} Leave out "
                "what measures the tracking condition (TrackingConditionMonitor), or replace the operation: "
                "compiled regions, fused attention and recurrent kernels have none."
            ) from error
        squares = [e.to(sum_dtype(e)).square().sum() for e in errors]
        scale = torch.as_tensor(crossings[0].scale, dtype=norm.dtype, device=norm.device)
        return {
            "epsilon_square": torch.stack(squares).sum(),
            "jacobian_square": norm.square(),
            "scale": scale,
        }


def tracking_condition(
    measured: Mapping[str, Tensor], true_weights: Mapping[str, Tensor]
) -> TrackingCondition:
    """The condition from the figures of `TrackingInstrument` and the true gradients of a `BoundaryReport`.

    Figures of several micro-batches may be added up before: K is then bounded from above by the root of the
    sum of squares.

    Args:
        measured: The figures of a boundary.
        true_weights: `true_weights` of its report.
    """
    scale = measured["scale"]
    zero = torch.zeros_like(measured["epsilon_square"])
    squares = [g.to(sum_dtype(g)).square().sum() for g in true_weights.values()]
    return TrackingCondition(
        epsilon=measured["epsilon_square"].sqrt() / scale,
        jacobian_norm=measured["jacobian_square"].sqrt(),
        gradient_norm=torch.stack([zero, *squares]).sum().sqrt() / scale,
    )


def largest_singular_value(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """The largest singular value of the derivative of all `outputs` in all `inputs`, by power iteration.

    A vector-Jacobian product is linear in its vector, so the product with the Jacobian itself is the
    derivative of that: two passes down the graph, which is kept, and nothing is run forward. Every iterate
    is a lower bound.

    Args:
        outputs: Tensors with a graph that has second derivatives.
        inputs: What they are differentiated in; none gives zero.
        iterations: At most so many.
        tolerance: Relative change of the value at which to stop.
        seed: Of the first vector; the global generator is left alone.

    Raises:
        RuntimeError: The graph has no second derivatives.
    """
    adjoint = [torch.zeros_like(h, requires_grad=True) for h in outputs]
    pulled = _pull(outputs, inputs, adjoint, create_graph=True) if inputs else []
    reached = [(v, g) for v, g in zip(inputs, pulled, strict=True) if g is not None]
    sigma = torch.zeros((), dtype=sum_dtype(outputs[0]), device=outputs[0].device)
    if not reached:
        return sigma
    variables, products = [v for v, _ in reached], [g for _, g in reached]
    if not all(g.requires_grad for g in products):
        raise RuntimeError("a derivative that does not depend on what it is given.")
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(v.shape, generator=generator).to(v) for v in variables]
    for _ in range(iterations):
        length = _norm(vector)
        if not length:
            break
        pushed = torch.autograd.grad(products, adjoint, [v / length.to(v) for v in vector], retain_graph=True)
        before, sigma = sigma, _norm(pushed)
        if abs(sigma - before) <= tolerance * sigma:
            break
        vector = [g for g in _pull(outputs, variables, pushed) if g is not None]
    return sigma


def _pull(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(
        outputs, inputs, gradients, retain_graph=True, create_graph=create_graph, allow_unused=True
    )


def _errors(crossing: Observation) -> list[Tensor]:
    """What was applied minus what is true, leaf by leaf."""
    if crossing.applied is None:
        return [torch.zeros_like(h) for h in crossing.h] if crossing.true is None else list(crossing.true)
    if crossing.true is None:
        return list(crossing.applied)
    return [a - t for a, t in zip(crossing.applied, crossing.true, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.detach().to(sum_dtype(t)).square().sum() for t in tensors]).sum().sqrt()
