"""The floor: no gradient at all, so that only the last stage learns."""

from typing import Any, final

from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Gradient, GradientEstimator


@final
class ZeroEstimator(GradientEstimator):
    """SG(h) = 0: the parameters below the last boundary never move ("No Bprop" in Jaderberg et al. 2017).

    Args:
        spec: The boundary's spec.
    """

    facts = Facts(gradient="0", synthesis="0", target="none", loss="none")

    def __init__(self, spec: BoundarySpec) -> None:
        super().__init__()

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """No gradient for any `h`."""
        return None, None
