"""A linear probe whose loss the stage follows."""

from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Record
from lightning_dni.estimators.head import ClassHead


@final
class ProbeEstimator(GradientEstimator):
    """d CE(hA + C, y) / dh, with a linear classifier trained on the labels (Czarnecki et al. 2017).

    It is LocalLossEstimator without hidden layers, under the name of the table of error approximators.

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; labels `[batch]`, or `[batch, positions]`.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activation, the labels or a size does not fit.
    """

    facts = Facts(gradient="dl/dh", synthesis="hA + C", target="label y", loss="cross-entropy")

    def __init__(self, spec: BoundarySpec, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.head = ClassHead(spec, num_classes, (), ignore_index)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the probe's loss on the labels."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the probe on the labels, averaged over rows."""
        assert record.context is not None
        return self.head.loss(record, record.context)
