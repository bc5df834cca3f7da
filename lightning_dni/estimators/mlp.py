"""The multilayer estimator of Jaderberg et al. 2017, appendix C."""

from collections.abc import Sequence
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, split
from lightning_dni.estimators.layers import Stack, check_sizes
from lightning_dni.estimators.normalization import BatchNorm
from lightning_dni.estimators.regression import prop_locks, propagated, regression_loss


@final
class MLPEstimator(GradientEstimator):
    """Hidden layers (linear, batch norm, ReLU), then a linear layer that starts at exactly zero.

    Several leaves are one `h`, laid side by side. Its graph costs more than `h` and is built again for
    the loss.

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map. For feature
            maps `[batch, channels, ...]` there is ConvEstimator.
        hidden_sizes: Widths of the hidden layers.
        batch_norm: Whether hidden layers are normalized, over rows and positions.
        num_classes: Number of classes where labels are the context; they enter the first layer.
        context_size: Width of a continuous context; it enters the first layer.
        prop_alpha: Weight of the derivative of the SG loss with respect to `h`, which is added to what the
            stage below is given; that has to wait for the target then.

    Raises:
        EstimatorError: A width is not positive, or the spec or a context does not fit.
    """

    needs = frozenset({Signal.TARGET})
    regresses = True
    facts = Facts(gradient="SG(h, y)", synthesis="MLP of h and y", target="dL/dh", loss="squared distance")
    keeps_graph = False

    def __init__(
        self,
        spec: BoundarySpec,
        hidden_sizes: Sequence[int] = (1024, 1024),
        batch_norm: bool = True,
        num_classes: int | None = None,
        context_size: int | None = None,
        prop_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.locks, self.prop_alpha = self.locks_with(prop_alpha=prop_alpha), prop_alpha
        check_sizes("hidden_sizes", hidden_sizes)
        self.num_classes, self.context_size = num_classes, context_size
        sizes = [joint_width(spec), *hidden_sizes, joint_width(spec)]
        self.stack = Stack(nn.Linear, sizes, partial(BatchNorm, feature_dim=-1) if batch_norm else None)
        self.conditioning = Conditioning(
            spec, sizes[1], num_classes, context_size, zero=len(hidden_sizes) == 0
        )

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None, track: bool = False) -> Gradient:
        x = join(h)
        return split(self.stack(x, self.conditioning(context, x), track), h)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The network's prediction."""
        return self._predict(h, context, track=True), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        return regression_loss(self._predict, record, feedback)

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """With `prop_alpha`, the prediction and what the SG loss adds to it."""
        return propagated(self._predict, record, feedback, self.prop_alpha)

    @classmethod
    def locks_with(cls, **options: Any) -> frozenset[Lock]:
        """The target is waited for with `prop_alpha`."""
        return cls.locks | prop_locks(options)
