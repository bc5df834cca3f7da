"""A critic that is trained on the values and on the derivatives of the network above."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

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
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.head import ClassHead, check_share, summed_cross_entropy


@final
class SobolevEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on the network's output and on that derivative.

    A critic whose derivative follows the target gradient, too (Czarnecki et al. 2017, "Sobolev training for
    neural networks"): its loss is the critic's plus `derivative_weight` times the SG loss. It assumes
    that the network's loss is a cross-entropy summed over rows (and over positions, where labels are per
    position).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; the network's output must be scores `[batch, num_classes]`, or
            `[batch, positions, num_classes]` where labels are per position.
        hidden_sizes: Widths of the head's hidden layers.
        derivative_weight: Weight of the SG loss beside the loss of the values.
        label_share: Share of the labels in the values, from 0 to 1, beside the network's probabilities. An
            untrained network says nothing of the labels, and through many boundaries it is long untrained.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activation, the labels, a size or the weight does not fit.
    """

    needs = frozenset({Signal.OUTPUT, Signal.TARGET})
    facts = Facts(
        gradient="d CE(s, y)/dh",
        synthesis="linear or MLP of h",
        target="softmax(p), p the network's output (with a share of y), and dL/dh",
        loss="cross-entropy, and squared distance of d CE(s, y)/dh",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int,
        hidden_sizes: Sequence[int] = (),
        derivative_weight: float = 1.0,
        label_share: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= derivative_weight < float("inf"):
            raise EstimatorError(
                f"Expected `derivative_weight` to be a number of at least 0, but got {derivative_weight!r}."
            )
        check_share("label_share", label_share)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.derivative_weight, self.label_share = derivative_weight, label_share
        self.head = ClassHead(spec, num_classes, hidden_sizes, ignore_index)
        self._boundary = spec.name

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the labels' loss through the model of the network above."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context, twice=True)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """The critic's loss and the SG loss, averaged over rows.

        Raises:
            EstimatorError: The network's output has another shape than the head's scores.
        """
        gradient, scores = record.gradient, record.state
        assert feedback.output is not None
        assert feedback.target is not None
        name, share = who(self, self._boundary), self.label_share
        followed = self.head.followed(feedback.output, scores, record.context, share, name)
        if gradient is None or not gradient[0].requires_grad:
            gradient, scores = self.synthesize(record.h, record.context, None)
        assert gradient is not None
        values = summed_cross_entropy(scores, followed) / max(1, rows_of(record.h))
        return values + self.derivative_weight * sg_loss(gradient, feedback.target, feedback.row_weights)
