"""The true gradient, some steps old: what asynchronous pipelines train on."""

from typing import Any, final

import torch
from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.errors import EstimatorError


@final
class DelayedGradientEstimator(GradientEstimator):
    """dL/dh of an earlier batch, pulled back through the stage as it was then.

    These are the delayed gradients of Huo et al. (ICML 2018), with weights stashed as in PipeDream: at step t
    the stage below is updated with the gradient of batch t - `delay`, of the activations and the weights of
    that step. It is no estimate applied to other rows. In the first `delay` steps the stage is not updated.
    What arrives from the next boundary may be old already, so delays add up downwards: with `delay=1` at each
    boundary the k-th from the top is k steps old. Weights that a loss term or the last stage uses, too, are
    given that part at once.

    Args:
        spec: The boundary's spec.
        delay: Age that the gradient gains here, in optimizer steps; 0 is backprop.

    Raises:
        EstimatorError: `delay` is no integer of at least 0.
    """

    needs = frozenset({Signal.TARGET})
    relays = True
    facts = Facts(gradient="dL/dh, `delay` steps late", synthesis="h", target="-dL/dh", loss="-t s^T")

    def __init__(self, spec: BoundarySpec, delay: int = 1) -> None:
        super().__init__()
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise EstimatorError(f"Expected `delay` to be an integer of at least 0, but got {delay!r}.")
        self.delay, self.locks = delay, self.locks_with(delay=delay)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing: it is there later."""
        return None, None

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """What came back."""
        return feedback.target

    @classmethod
    def locks_with(cls, **options: Any) -> frozenset[Lock]:
        """Those of backprop without a delay; else the stage waits for nothing of its own batch."""
        return cls.locks if options.get("delay", 1) else frozenset({Lock.UPDATE, Lock.BACKWARD})

    def get_extra_state(self) -> Tensor:
        """The delay."""
        return torch.tensor(self.delay)

    def set_extra_state(self, state: Any) -> None:
        """Refuse a run with another delay, whose gradients under way are of another age."""
        if int(state) != self.delay:
            raise EstimatorError(
                f"Expected the state of a DelayedGradientEstimator with `delay`={self.delay}, but got that "
                f"of one with {int(state)}. Resume with the `delay` of the saved run."
            )
