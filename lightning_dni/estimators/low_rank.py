"""The linear estimator in few numbers, for wide layers and large vocabularies."""

from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Record, Signal
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, mask_padding, split
from lightning_dni.estimators.layers import check_sizes, start_at_zero
from lightning_dni.estimators.regression import regression_loss


@final
class LowRankEstimator(GradientEstimator):
    """SG(h, y) = (hU + yE)V + C: hA + yB + C of Czarnecki et al. 2017 with [A; B] of rank at most `rank`.

    It has 2 x rank x width numbers in place of width^2, and rank in place of width for each class. V and C
    start at zero. Several leaves are one `h`, laid side by side.

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map.
        rank: Width of what lies between U and V.
        num_classes: Number of classes where labels are the context; with tokens, the vocabulary.
        context_size: Width of a continuous context.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activations have no common feature dimension, or a size or context does not fit.
    """

    needs = frozenset({Signal.TARGET})
    regresses = True
    differentiates = True
    facts = Facts(gradient="SG(h, y)", synthesis="(hU + yE)V + C", target="dL/dh", loss="squared distance")

    def __init__(
        self,
        spec: BoundarySpec,
        rank: int = 32,
        num_classes: int | None = None,
        context_size: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes("rank", [rank])
        self.num_classes, self.context_size, self.ignore_index = num_classes, context_size, ignore_index
        width = joint_width(spec)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        self.conditioning = Conditioning(
            spec, rank, num_classes, context_size, zero=False, ignore_index=ignore_index
        )
        start_at_zero(self.up)

    def _narrow(self, x: Tensor, context: Tensor | None) -> Tensor:
        z: Tensor = self.down(x)
        added = self.conditioning(context, z)
        return z if added is None else z + added

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None) -> Gradient:
        said = self.up(self._narrow(join(h), context))
        return split(mask_padding(said, context, self.ignore_index), h)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The prediction."""
        return self._predict(h, context), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        return regression_loss(self._predict, record, feedback)

    def parameter_gradients(
        self, record: Record, derivative: Gradient, scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Outer products at both maps, summed over positions."""
        x = join(record.h)
        d = mask_padding(join(derivative), record.context, self.ignore_index)
        narrow = self._narrow(x, record.context).flatten(0, -2)
        reached = torch.matmul(d, self.up.weight)
        flat = d.flatten(0, -2)
        return [
            (self.up.weight, (flat.t() @ narrow).mul_(scale)),
            (self.up.bias, flat.sum(0).mul_(scale)),
            (self.down.weight, (reached.flatten(0, -2).t() @ x.flatten(0, -2)).mul_(scale)),
            *self.conditioning.parameter_gradients(record.context, reached, scale),
        ]
