"""The convolutional estimator of Jaderberg et al. 2017, appendix C: labels are extra input planes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Feedback, Gradient, GradientEstimator, Record, Signal
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.mlp import check_widths, start_at_zero
from lightning_dni.estimators.normalization import BatchNorm

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

    Raises:
        EstimatorError: The activation is no feature map, or a size is out of range.
    """

    needs = frozenset({Signal.TARGET})
    keeps_graph = False

    def __init__(
        self,
        spec: BoundarySpec,
        hidden_channels: Sequence[int] = (64, 64),
        kernel_size: int = 5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_widths("hidden_channels", hidden_channels)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise EstimatorError(f"Expected `kernel_size` to be odd, but got {kernel_size}.")
        if len(spec.shape) not in _CONVOLUTIONS:
            raise EstimatorError(
                f"Expected feature maps [batch, channels, ...] at boundary {spec.name!r}, but got rows of "
                f"shape {spec.shape}. Use LinearEstimator or MLPEstimator there."
            )
        self.num_classes = num_classes
        convolution = _CONVOLUTIONS[len(spec.shape)]
        channels = spec.shape[0]
        sizes = [channels + (num_classes or 0), *hidden_channels, channels]
        self.layers = nn.ModuleList(
            convolution(a, b, kernel_size, padding=kernel_size // 2) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(BatchNorm(size) for size in hidden_channels)
        start_at_zero(self.layers[-1])

    def _predict(self, h: Tensor, context: Tensor | None) -> Tensor:
        if context is not None and self.num_classes is not None:
            if context.ndim != 1:
                raise EstimatorError(
                    f"Expected one label per sample, [batch], but got labels of shape {tuple(context.shape)}."
                )
            one_hot = F.one_hot(context, self.num_classes).to(h.dtype)
            planes = one_hot.view(*one_hot.shape, *[1] * (h.ndim - 2))
            h = torch.cat([h, planes.expand(-1, -1, *h.shape[2:])], dim=1)
        x: Tensor = self.layers[0](h)
        for norm, layer in zip(self.norms, list(self.layers)[1:], strict=True):
            x = layer(F.relu(norm(x)))
        return x

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The network's prediction."""
        return (self._predict(h[0], context),), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        assert feedback.target is not None
        prediction = (self._predict(record.h[0], record.context),)
        return sg_loss(prediction, feedback.target, feedback.row_weights)
