"""The linear estimator, SG(h, y) = hA + yB + C."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, split
from lightning_dni.estimators.layers import start_at_zero
from lightning_dni.estimators.regression import prop_locks, propagated, regression_loss


@final
class LinearEstimator(GradientEstimator):
    """SG(h, y) = hA + yB + C, all zero at first (Czarnecki et al. 2017, section 2).

    Several leaves are one `h`, laid side by side.

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map. For feature
            maps `[batch, channels, ...]` there is ConvEstimator.
        num_classes: Number of classes where labels are the context.
        context_size: Width of a continuous context.
        prop_alpha: Weight of the derivative of the SG loss with respect to `h`, which is added to what the
            stage below is given; that has to wait for the target then.

    Raises:
        EstimatorError: The activations have no common feature dimension, or a context does not fit.
    """

    needs = frozenset({Signal.TARGET})
    regresses = True
    facts = Facts(gradient="SG(h, y)", synthesis="hA + yB + C", target="dL/dh", loss="squared distance")
    differentiates = True

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int | None = None,
        context_size: int | None = None,
        prop_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.locks, self.prop_alpha = self.locks_with(prop_alpha=prop_alpha), prop_alpha
        self.num_classes, self.context_size = num_classes, context_size
        width = joint_width(spec)
        self.map = nn.Linear(width, width)
        self.conditioning = Conditioning(spec, width, num_classes, context_size)
        start_at_zero(self.map)

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None) -> Gradient:
        x = join(h)
        added = self.conditioning(context, x, self.map.bias)
        if added is None:
            return split(self.map(x), h)
        if x.ndim == 2:  # one product that adds up in place, instead of a product and a pass over all rows
            return split(added.addmm_(x, self.map.weight.t()), h)
        return split(F.linear(x, self.map.weight) + added, h)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The linear prediction."""
        return self._predict(h, context), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        return regression_loss(self._predict, record, feedback)

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """With `prop_alpha`, the prediction and what the SG loss adds to it."""
        return propagated(self._predict, record, feedback, self.prop_alpha)

    @classmethod
    def locks_with(cls, **options: Any) -> frozenset[Lock]:
        """The target is waited for with `prop_alpha`."""
        return cls.locks | prop_locks(options)

    def parameter_gradients(
        self, record: Record, derivative: Gradient, scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Of a linear map: the outer products of what came in and the derivative, summed over positions."""
        x, d = join(record.h).flatten(0, -2), join(derivative)
        positions = d.flatten(0, -2)
        return [
            (self.map.weight, torch.addmm(self.map.weight, positions.t(), x, beta=0, alpha=scale)),
            (self.map.bias, positions.sum(0).mul_(scale)),
            *self.conditioning.parameter_gradients(record.context, d, scale),
        ]
