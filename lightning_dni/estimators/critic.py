"""A critic: a small model of the network above, through which the labels give the gradient."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import (
    Feedback,
    Gradient,
    GradientEstimator,
    Record,
    Signal,
    rows_of,
)
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.head import ClassHead, loss_and_derivative, summed_cross_entropy


@final
class CriticEstimator(GradientEstimator):
    """SG(h, y) = d CE(head(h), y) / dh, the head trained on what the network's output really was.

    The head models the network above (Czarnecki et al. 2017, "Sobolev training", critic): its targets are
    the class probabilities that the network gave for the same rows.

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps.
        num_classes: Number of classes; the network's output must be scores `[batch, num_classes]`
            or `[batch, positions, num_classes]`.
        hidden_sizes: Widths of the head's hidden layers.

    Raises:
        EstimatorError: The activation or a size does not fit.
    """

    needs = frozenset({Signal.OUTPUT})

    def __init__(self, spec: BoundarySpec, num_classes: int, hidden_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = ClassHead(spec, num_classes, hidden_sizes)
        self._boundary = spec.name

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The derivative of the labels' loss through the model of the network above."""
        assert context is not None
        _, scores, derivative = loss_and_derivative(self.head, h[0], context)
        return (derivative,), scores

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """Cross-entropy of the head on the network's output probabilities, averaged over rows.

        Raises:
            EstimatorError: The network's output has another shape than the head's scores.
        """
        output = feedback.output
        assert output is not None
        scores: Tensor = record.state
        if not scores.requires_grad:
            assert record.context is not None
            scores = self.head(record.h[0], per_position=record.context.ndim > 1)
        if output.shape != scores.shape:
            raise EstimatorError(
                f"Expected the network's output for CriticEstimator at boundary {self._boundary!r} to be "
                f"class scores of shape {tuple(scores.shape)}, but got {tuple(output.shape)}. Pass "
                "`output=` the submodule that gives the scores."
            )
        probabilities = torch.softmax(output.to(scores.dtype), dim=-1)
        return summed_cross_entropy(scores, probabilities) / rows_of(record.h)
