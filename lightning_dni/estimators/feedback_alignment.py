"""Feedback alignment: the way back goes through fixed random matrices."""

from typing import Any, cast, final

from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.consumer import Layer, input_gradient
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.estimators.fixed import FixedMatrices


@final
class FeedbackAlignmentEstimator(GradientEstimator):
    """(dL/dg) A^T: the layer that reads `h`, g = hW + b, sends its gradient back through a random A, not W.

    The layer's own weights follow the exact gradient for what arrives at it. What lies between the
    boundary and that layer (ReLU, a norm) is differentiated as it is. It is feedback alignment (Lillicrap
    et al. 2016) where every linear layer and convolution but the first reads the output of a boundary;
    otherwise a hybrid with backprop, of which the engine warns. Each layer's matrix is drawn once, as
    torch draws its weight.

    Args:
        spec: The boundary's spec.
    """

    needs = frozenset({Signal.TARGET, Signal.CONSUMER})
    locks = frozenset({Lock.UPDATE, Lock.BACKWARD})
    relays = True
    facts = Facts(
        gradient="(dL/dg) A^T",
        synthesis="hA, A fixed and random",
        target="-dL/dg, g the next layer's output",
        loss="-t s^T",
    )

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.matrices = FixedMatrices()

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing: it has to wait."""
        return None, None

    def pull_back(self, name: str, consumer: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient through the fixed matrix."""
        layer = cast(Layer, consumer)
        return input_gradient(layer, self.matrices.get(name, layer.weight.shape, gradient), x, gradient)

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """What came back that way."""
        return feedback.target
