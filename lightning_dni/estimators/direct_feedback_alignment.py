"""Direct feedback alignment: the output's error goes straight to every activation."""

from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.estimators.fixed import FixedMatrices, lay_out, spread, width_of


@final
class DirectFeedbackAlignmentEstimator(GradientEstimator):
    """(dL/dp) A^T: the gradient at the network's output p, through a fixed random A (Nokland 2016).

    It waits for the loss, but for no backward pass. Sequences `[batch, positions, features]` share A over
    positions; other activations have one A for all of a row. A is drawn once, as torch draws the weight
    of a linear layer from `h` to the output.

    Args:
        spec: The boundary's spec.
    """

    needs = frozenset({Signal.OUTPUT_GRADIENT})
    locks = frozenset({Lock.UPDATE})
    facts = Facts(
        gradient="(dL/dp) A^T",
        synthesis="hA, A fixed and random",
        target="-dL/dp, p the network's output",
        loss="-t s^T",
    )

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()
        self.matrices = FixedMatrices()
        self._boundary = spec.name

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing: it has to wait."""
        return None, None

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """The output's error through the fixed matrix of each leaf.

        Raises:
            EstimatorError: The output has other rows than the activation.
        """
        assert feedback.output_gradient is not None
        return tuple(self._project(str(k), h, feedback.output_gradient) for k, h in enumerate(record.h))

    def _project(self, leaf: str, h: Tensor, output_gradient: Tensor) -> Tensor:
        error = lay_out(output_gradient, h, self._boundary).to(h.dtype)
        return spread(error @ self.matrices.get(leaf, (error.shape[-1], width_of(h)), h), h)
