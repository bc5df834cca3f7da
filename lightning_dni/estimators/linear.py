"""The linear estimator, SG(h, y) = hA + yB + C."""

from typing import Any, final

from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Feedback, Gradient, GradientEstimator, Record, Signal
from lightning_dni.core.target import sg_loss
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, split


@final
class LinearEstimator(GradientEstimator):
    """SG(h, y) = hA + yB + C, all zero at first (Czarnecki et al. 2017, section 2).

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map.
        num_classes: Number of classes where labels are the context.
        context_size: Width of a continuous context.

    Raises:
        EstimatorError: The activations have no common feature dimension, or both contexts are given.
    """

    needs = frozenset({Signal.TARGET})

    def __init__(
        self, spec: BoundarySpec, num_classes: int | None = None, context_size: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.context_size = num_classes, context_size
        width = joint_width(spec)
        self.map = nn.Linear(width, width)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.conditioning = Conditioning(width, num_classes, context_size)

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None) -> Gradient:
        return split(self.conditioning(self.map(join(h)), context), h)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The linear prediction."""
        return self._predict(h, context), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        assert feedback.target is not None
        prediction = record.gradient
        if prediction is None or not prediction[0].requires_grad:
            prediction = self._predict(record.h, record.context)
        return sg_loss(prediction, feedback.target, feedback.row_weights)
