"""A local loss: the stage follows a small classifier of its own and learns from the labels alone."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Feedback, Gradient, GradientEstimator, Record, rows_of
from lightning_dni.estimators.head import ClassHead, loss_and_derivative, summed_cross_entropy


@final
class LocalLossEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on the labels (Belilovsky et al. 2020).

    No gradient and no output of the network above ever reaches it.

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps.
        num_classes: Number of classes; labels `[batch]`, or `[batch, positions]`.
        hidden_sizes: Widths of the head's hidden layers.

    Raises:
        EstimatorError: The activation or a size does not fit.
    """

    def __init__(self, spec: BoundarySpec, num_classes: int, hidden_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = ClassHead(spec, num_classes, hidden_sizes)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the head's loss on the labels."""
        assert context is not None
        loss, _, derivative = loss_and_derivative(self.head, h[0], context)
        return (derivative,), loss

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the head on the labels, averaged over rows."""
        assert record.context is not None
        summed: Tensor = record.state
        if not summed.requires_grad:
            scores = self.head(record.h[0], per_position=record.context.ndim > 1)
            summed = summed_cross_entropy(scores, record.context)
        return summed / rows_of(record.h)
