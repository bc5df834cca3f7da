"""Backprop in the language of error approximators: the exact gradient, waited for."""

from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal


@final
class BackpropEstimator(GradientEstimator):
    """dL/dh as it came from above, to the bit: the same as `bp_lambda` = 1.

    It is the true gradient where the boundaries above have it, too.

    Args:
        spec: The boundary's spec.
    """

    needs = frozenset({Signal.TARGET})
    locks = frozenset({Lock.UPDATE, Lock.BACKWARD})
    relays = True
    facts = Facts(gradient="dL/dh", synthesis="h", target="-dL/dh", loss="-t s^T")

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing: it has to wait."""
        return None, None

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """What came back."""
        return feedback.target
