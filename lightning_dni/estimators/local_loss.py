"""A local loss: the stage follows a small classifier of its own and learns from the labels alone."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Record
from lightning_dni.estimators.head import ClassHead


@final
class LocalLossEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on the labels (Belilovsky et al. 2020).

    No gradient and no output of the network above ever reaches it. It assumes that the network's loss
    is a cross-entropy summed over rows (and over positions, where labels are per position).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; labels `[batch]`, or `[batch, positions]`.
        hidden_sizes: Widths of the head's hidden layers.

    Raises:
        EstimatorError: The activation, the labels or a size does not fit.
    """

    facts = Facts(
        gradient="dl/dh",
        synthesis="linear or MLP of h",
        target="label y",
        loss="cross-entropy",
    )

    def __init__(self, spec: BoundarySpec, num_classes: int, hidden_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = ClassHead(spec, num_classes, hidden_sizes)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the head's loss on the labels."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the head on the labels, averaged over rows."""
        assert record.context is not None
        return self.head.loss(record, record.context)
