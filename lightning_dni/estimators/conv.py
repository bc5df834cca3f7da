"""The convolutional estimator of Jaderberg et al. 2017, appendix C: labels are extra input planes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Lock, Record, Signal
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import check_aligned
from lightning_dni.estimators.layers import Stack, check_sizes
from lightning_dni.estimators.normalization import BatchNorm
from lightning_dni.estimators.regression import prop_locks, propagated, regression_loss

_CONVOLUTIONS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}


@final
class ConvEstimator(GradientEstimator):
    """Same-size convolutions (batch norm, ReLU between), the last one starting at exactly zero.

    Its graph costs more than `h` and is built again for the loss.

    Args:
        spec: The boundary's spec; `h` is `[batch, channels, length]`, `[batch, channels, height, width]`
            or `[batch, channels, depth, height, width]`.
        hidden_channels: Channels of the hidden layers.
        kernel_size: An odd number.
        num_classes: Number of classes where labels `[batch]` are the context: one plane per class,
            ones for the sample's own.
        prop_alpha: Weight of the derivative of the SG loss with respect to `h`, which is added to what the
            stage below is given; that has to wait for the target then.

    Raises:
        EstimatorError: The activation is no feature map, or a size is out of range.
    """

    needs = frozenset({Signal.TARGET})
    regresses = True
    facts = Facts(
        gradient="SG(h, y)", synthesis="convolutions of h and y", target="dL/dh", loss="squared distance"
    )
    keeps_graph = False

    def __init__(
        self,
        spec: BoundarySpec,
        hidden_channels: Sequence[int] = (64, 64),
        kernel_size: int = 5,
        num_classes: int | None = None,
        prop_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.locks, self.prop_alpha = self.locks_with(prop_alpha=prop_alpha), prop_alpha
        check_sizes("hidden_channels", hidden_channels)
        check_sizes("num_classes", [] if num_classes is None else [num_classes])
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise EstimatorError(f"Expected `kernel_size` to be odd and positive, but got {kernel_size}.")
        if len(spec.shape) not in _CONVOLUTIONS:
            raise EstimatorError(
                f"Expected feature maps [batch, channels, ...] at boundary {spec.name!r}, but got rows of "
                f"shape {spec.shape}. Use LinearEstimator or MLPEstimator there."
            )
        self.num_classes = num_classes
        self._boundary = spec.name
        convolution = _CONVOLUTIONS[len(spec.shape)]
        channels = spec.shape[0]
        self.stack = Stack(
            partial(convolution, kernel_size=kernel_size, padding=kernel_size // 2),
            [channels + (num_classes or 0), *hidden_channels, channels],
            BatchNorm,
        )

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None, track: bool = False) -> Gradient:
        return (self.stack(self._with_planes(h[0], context), track=track),)

    def _with_planes(self, h: Tensor, context: Tensor | None) -> Tensor:
        if context is None or self.num_classes is None:
            return h
        check_aligned(context.shape, h.shape[:1], self._boundary)
        one_hot = F.one_hot(context.long(), self.num_classes).to(h.dtype)
        planes = one_hot.view(*one_hot.shape, *[1] * (h.ndim - 2))
        return torch.cat([h, planes.expand(-1, -1, *h.shape[2:])], dim=1)

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
