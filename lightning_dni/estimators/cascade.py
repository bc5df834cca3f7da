"""Critics in a cascade: each predicts the loss that the next one predicts, the last the true one."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import (
    Facts,
    Feedback,
    Gradient,
    GradientEstimator,
    Record,
    Signal,
    rows_of,
    who,
)
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.head import ClassHead, check_scores, cross_entropy


@final
class CriticCascade(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, that loss trained towards the one that the critic above predicts.

    The topmost critic follows the true loss (local critic training, Lee et al.). Each learns as soon as the
    next boundary is reached; none but the topmost waits for the network's output. It assumes that the
    network's loss is a cross-entropy summed over rows (and over positions, where labels are per position).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; the network's output must be scores `[batch, num_classes]`, or
            `[batch, positions, num_classes]` where labels are per position.
        hidden_sizes: Widths of the head's hidden layers.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activation, the labels or a size does not fit.
    """

    needs = frozenset({Signal.ESTIMATOR_ABOVE})
    facts = Facts(
        gradient="d CE(s, y)/dh",
        synthesis="linear or MLP of h",
        target="CE(s', y), s' of the estimator above; L for the topmost",
        loss="absolute difference of CE(s, y)",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int,
        hidden_sizes: Sequence[int] = (),
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.head = ClassHead(spec, num_classes, hidden_sizes, ignore_index)
        self._boundary = spec.name

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the loss that is predicted for the labels."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Absolute difference of the predicted losses, averaged over rows.

        Raises:
            EstimatorError: The estimator above predicts no loss, or the output is no class scores.
        """
        assert record.context is not None
        predicted = self._losses(self.head.scores_in(record), record.context)
        target = self._loss_above(record.state, record.context, feedback)
        if target is None or target.shape != predicted.shape:
            got = "nothing" if target is None else f"a tensor of shape {tuple(target.shape)}"
            raise EstimatorError(
                f"Expected the estimator above {who(self, self._boundary)} to predict a loss for each label, "
                f"but it predicts {got}. Use CriticCascade at every boundary above, or CriticEstimator here."
            )
        return F.l1_loss(predicted, target, reduction="sum") / max(1, rows_of(record.h))

    def value(self, record: Record) -> Tensor | None:
        """The loss that it predicts, for each label."""
        assert record.context is not None
        return self._losses(record.state, record.context)

    def _loss_above(self, scores: Tensor, labels: Tensor, feedback: Feedback) -> Tensor | None:
        if feedback.above is not None or feedback.output is None:
            return feedback.above
        check_scores(feedback.output, scores, who(self, self._boundary))
        return self._losses(feedback.output.to(scores.dtype), labels)

    def _losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(scores, labels, self.ignore_index, "none")
