"""A local loss: the stage follows a small classifier of its own and learns from the labels alone."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Record
from lightning_dni.estimators.head import ClassHead, check_share
from lightning_dni.estimators.similarity import SimilarityMatching


@final
class LocalLossEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on the labels (Belilovsky et al. 2020).

    With `similarity` = b the loss is (1 - b) CE(head(h), y) + b times that of similarity matching: the
    prediction and similarity loss of Nokland and Eidnes 2019. It then does not start at zero, since
    activations are alike or not before anything is learnt, and a row's gradient depends on the other rows.

    No gradient and no output of the network above ever reaches it. It assumes that the network's loss
    is a cross-entropy summed over rows (and over positions, where labels are per position).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; labels `[batch]`, or `[batch, positions]`.
        hidden_sizes: Widths of the head's hidden layers.
        similarity: Weight of similarity matching, from 0 to 1; above 0 labels are `[batch]`.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activation, the labels, a size or the weight does not fit.
    """

    facts = Facts(
        gradient="dl/dh",
        synthesis="linear or MLP of h",
        target="label y",
        loss="cross-entropy",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int,
        hidden_sizes: Sequence[int] = (),
        similarity: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_share("similarity", similarity)
        self.num_classes, self.similarity, self.ignore_index = num_classes, similarity, ignore_index
        self.head = ClassHead(spec, num_classes, hidden_sizes, ignore_index)
        self.matching = SimilarityMatching(spec, num_classes, ignore_index) if similarity else None

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the head's loss on the labels."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context)
        if self.matching is not None:
            matched = self.matching.gradient(h[0], context)
            derivative = (1.0 - self.similarity) * derivative + self.similarity * matched
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the head on the labels, averaged over rows, with that of similarity matching."""
        assert record.context is not None
        prediction = self.head.loss(record, record.context)
        if self.matching is None:
            return prediction
        matching: Tensor = self.matching(record.h[0], record.context)
        return (1.0 - self.similarity) * prediction + self.similarity * matching
