"""A critic: a small model of the network above, through which the labels give the gradient."""

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
    who,
)
from lightning_dni.estimators.head import ClassHead, check_share


@final
class CriticEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on what the network's output really was.

    The head models the network above (Czarnecki et al. 2017, "Sobolev training", critic): its targets are
    the class probabilities that the network gave for the same rows. It assumes that the network's loss
    is a cross-entropy summed over rows (and over positions, where labels are per position).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps, as ClassHead
            takes them.
        num_classes: Number of classes; the network's output must be scores `[batch, num_classes]`, or
            `[batch, positions, num_classes]` where labels are per position.
        hidden_sizes: Widths of the head's hidden layers.
        label_share: Share of the labels in the values, from 0 to 1, beside the network's probabilities. An
            untrained network says nothing of the labels, and through many boundaries it is long untrained.
        ignore_index: The label of padding: there the synthetic gradient is zero, and nothing is learnt.

    Raises:
        EstimatorError: The activation, the labels, a size or the share does not fit.
    """

    needs = frozenset({Signal.OUTPUT})

    facts = Facts(
        gradient="d CE(s, y)/dh",
        synthesis="linear or MLP of h",
        target="softmax(p), p the network's output (with a share of y)",
        loss="cross-entropy",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int,
        hidden_sizes: Sequence[int] = (),
        label_share: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_share("label_share", label_share)
        self.num_classes, self.label_share, self.ignore_index = num_classes, label_share, ignore_index
        self.head = ClassHead(spec, num_classes, hidden_sizes, ignore_index)
        self._boundary = spec.name

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the labels' loss through the model of the network above."""
        assert context is not None
        derivative, scores = self.head.gradient(h[0], context)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the head on the network's output probabilities, averaged over rows.

        Raises:
            EstimatorError: The network's output has another shape than the head's scores.
        """
        assert feedback.output is not None
        name, share = who(self, self._boundary), self.label_share
        followed = self.head.followed(feedback.output, record.state, record.context, share, name)
        return self.head.loss(record, followed)
