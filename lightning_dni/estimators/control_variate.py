"""Predicted gradients made unbiased by the true ones of some rows."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import (
    Facts,
    Feedback,
    Gradient,
    GradientEstimator,
    Lock,
    Record,
    Signal,
    rows_of,
)
from lightning_dni.core.randomness import derive_seed
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.linear import LinearEstimator


@final
class ControlVariateEstimator(GradientEstimator):
    """SG(h, y) for every row, and (b/m)(dL/dh - SG(h, y)) added on m of the b rows, chosen at random.

    The prediction is a control variate: whatever it is, the mean over the choice is dL/dh as it came from
    above, and so the stage's gradient is that of backprop in the mean, with the less variance the better the
    prediction ("Linear Gradient Prediction with Control Variates", arXiv 2511.05187; there the weights'
    gradients are predicted, here those of activations). The stage waits for the target.

    Args:
        spec: The boundary's spec, as the predictor takes it.
        fraction: Share m/b of the rows whose true gradient is used; at least one row is.
        num_classes: Number of classes where labels are the linear predictor's context.
        context_size: Width of a continuous context of the linear predictor.
        predictor: Makes another predictor, with a context of its own: of feature maps
            `partial(ConvEstimator, num_classes=10)`.

    Raises:
        EstimatorError: `fraction` is not above 0 and at most 1, the spec or a context does not fit, or the
            predictor does not learn by `sg_loss` alone, or waits for something.
    """

    needs = frozenset({Signal.TARGET})
    locks = frozenset({Lock.UPDATE, Lock.BACKWARD})
    regresses = True
    facts = Facts(
        gradient="SG(h, y), on m of b rows + (b/m)(dL/dh - SG(h, y))",
        synthesis="hA + yB + C, or another estimator's",
        target="dL/dh",
        loss="squared distance",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        fraction: float = 0.25,
        num_classes: int | None = None,
        context_size: int | None = None,
        predictor: Callable[[BoundarySpec], GradientEstimator] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < fraction <= 1.0:
            raise EstimatorError(f"Expected `fraction` to be above 0 and at most 1, but got {fraction!r}.")
        if predictor is not None and (num_classes is not None or context_size is not None):
            raise EstimatorError(
                "Expected `num_classes` and `context_size` among the options of `predictor`, but got them "
                f"beside it at boundary {spec.name!r}. Pass partial(ConvEstimator, num_classes=10), say."
            )
        self.fraction = fraction
        made = LinearEstimator(spec, num_classes, context_size) if predictor is None else predictor(spec)
        self.predictor = _checked(made, spec.name)
        self.num_classes, self.context_size = self.predictor.num_classes, self.predictor.context_size
        self.ignore_index = self.predictor.ignore_index
        self.keeps_graph, self.differentiates = self.predictor.keeps_graph, self.predictor.differentiates
        self._seed, self._drawn = int(torch.randint(2**62, ())), 0

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The prediction."""
        return self.predictor.synthesize(h, context, state)

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss of the prediction: squared distance to the target per row, averaged over rows."""
        return self.predictor.loss(record, feedback)

    def parameter_gradients(
        self, record: Record, derivative: Gradient, scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Those of the predictor."""
        return self.predictor.parameter_gradients(record, derivative, scale)

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """The prediction, and on the rows of the next choice what it is short of."""
        assert record.gradient is not None
        assert feedback.target is not None
        rows = rows_of(record.h)
        chosen = self._choose(rows).to(record.h[0].device)
        weight = rows / max(1, len(chosen))
        pairs = zip(record.gradient, feedback.target, strict=True)
        return tuple(s.index_add(0, chosen, (t - s)[chosen], alpha=weight) for s, t in pairs)

    def _choose(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._drawn))
        self._drawn += 1
        chosen = max(min(1, rows), round(self.fraction * rows))
        return torch.randperm(rows, generator=generator, device="cpu")[:chosen]

    def get_extra_state(self) -> Tensor:
        """The seed of the choices, and how many were made."""
        return torch.tensor([self._seed, self._drawn])

    def set_extra_state(self, state: Any) -> None:
        """Go on with the choices of a saved run."""
        self._seed, self._drawn = (int(number) for number in state)


def _checked(predictor: GradientEstimator, boundary: str) -> GradientEstimator:
    """Refuse a predictor whose own ways would be passed over."""
    kind = type(predictor)
    if not isinstance(predictor, GradientEstimator) or not predictor.regresses or predictor.stochastic:
        raise EstimatorError(
            "Expected `predictor` to make an estimator that regresses the gradient, such as LinearEstimator, "
            f"MLPEstimator or ConvEstimator, but got {kind.__name__} at boundary {boundary!r}."
        )
    if predictor.locks:
        raise EstimatorError(
            f"Expected `predictor` to wait for nothing, but got {kind.__name__} with prop_alpha at "
            f"boundary {boundary!r}. Leave `prop_alpha` out: the correction is ours."
        )
    return predictor
