"""Kickback: the sum of the output's errors goes straight to every unit."""

from typing import Any, final

import torch
from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import check_aligned
from lightning_dni.estimators.fixed import lay_out, spread
from lightning_dni.estimators.head import cross_entropy
from lightning_dni.estimators.layers import check_sizes


@final
class KickbackEstimator(GradientEstimator):
    """(dL/dp) 1^T: as direct feedback alignment with a matrix of ones (Balduzzi et al. 2015, simplified).

    The gradient of softmax cross-entropy with respect to the scores sums to zero over the classes, so it
    would be nothing at all; that is refused. With `num_classes` p are the class probabilities instead.

    Args:
        spec: The boundary's spec.
        num_classes: Number of classes, where the network's output is scores and its loss their
            cross-entropy on the labels, summed over rows (and over positions); its derivative with respect
            to the probability of the label, -1/p, then takes the place of that at the output. None: the
            derivative with respect to the output.

    Raises:
        EstimatorError: The errors sum to zero over the classes, or outputs or labels do not fit.
    """

    needs = frozenset({Signal.OUTPUT, Signal.OUTPUT_GRADIENT})
    locks = frozenset({Lock.UPDATE})
    facts = Facts(
        gradient="(dL/dp) 1^T",
        synthesis="h1, a matrix of ones",
        target="-dL/dp, p the network's output",
        loss="-t s^T",
    )

    def __init__(self, spec: BoundarySpec, num_classes: int | None = None) -> None:
        super().__init__()
        check_sizes("num_classes", [] if num_classes is None else [num_classes], at_least=2)
        self.num_classes = num_classes
        self._boundary = spec.name
        self._checked = False

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Nothing: it has to wait."""
        return None, None

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """The sum of the errors, for every unit.

        Raises:
            EstimatorError: The errors sum to zero, or outputs or labels do not fit.
        """
        error = feedback.output_gradient
        assert error is not None
        if self.num_classes is not None:
            error = self._with_respect_to_probabilities(feedback, record.context)
        elif not self._checked:
            self._check_sums(error, error.dtype if feedback.output is None else feedback.output.dtype)
        return tuple(self._spread(error, h) for h in record.h)

    def _spread(self, error: Tensor, h: Tensor) -> Tensor:
        total = lay_out(error, h, self._boundary).sum(-1, keepdim=True).to(h.dtype)
        return (
            spread(total.expand(*total.shape[:-1], h.shape[1:].numel()), h)
            if h.ndim != 3
            else spread(total, h)
        )

    def _with_respect_to_probabilities(self, feedback: Feedback, labels: Tensor | None) -> Tensor:
        scores = feedback.output
        assert scores is not None
        assert labels is not None
        check_aligned(labels.shape, scores.shape[:-1], self._boundary)
        if scores.shape != (*labels.shape, self.num_classes):
            raise EstimatorError(
                f"Expected the network's output for KickbackEstimator at boundary {self._boundary!r} to be "
                f"class scores of shape {(*labels.shape, self.num_classes)}, but got {tuple(scores.shape)}. "
                "Pass `output=` the submodule that gives the scores."
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss = cross_entropy(scores, labels, None, "none")
        return -loss.exp().view(*labels.shape, 1)

    def _check_sums(self, error: Tensor, dtype: torch.dtype) -> None:
        """Look once, since that waits for an accelerator."""
        size = error.abs().sum(-1)
        if error.shape[-1] == 1 or not bool(size.any()):
            return
        self._checked = True
        rounding = torch.finfo(dtype).eps ** 0.5
        if bool((error.sum(-1).abs() <= rounding * size).all()):
            raise EstimatorError(
                f"Expected `num_classes` for KickbackEstimator at boundary {self._boundary!r}, or a loss "
                "whose derivative with respect to the network's output does not sum to zero, but got one "
                "that does for every row, as that of softmax cross-entropy: a matrix of ones would make "
                "nothing of it. Train with squared error, or pass KickbackEstimator(num_classes=...) for the "
                "derivative with respect to the class probabilities."
            )
