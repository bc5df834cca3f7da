"""A small classifier on an activation, whose loss has a derivative with respect to that activation."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.mlp import check_widths, start_at_zero

_MAX_GRID = 4
"""Feature maps are averaged to at most this many cells a side, so that the head stays small."""


class ClassHead(nn.Module):
    """Predicts class scores from one activation; its last layer starts at exactly zero.

    `[batch, features]` goes in as it is; `[batch, positions, features]` position by position, averaged
    over positions where there is one label per sample; `[batch, channels, height, width]` averaged
    to a grid of at most 4 x 4.

    Args:
        spec: The boundary's spec.
        num_classes: Number of classes, at least two.
        hidden_sizes: Widths of hidden layers (linear, ReLU).

    Raises:
        EstimatorError: The activation has another form, or a size is out of range.
    """

    def __init__(self, spec: BoundarySpec, num_classes: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        if num_classes < 2:
            raise EstimatorError(f"Expected `num_classes` to be at least 2, but got {num_classes}.")
        check_widths("hidden_sizes", hidden_sizes)
        shape = spec.shape
        if len(shape) not in (1, 2, 3):
            raise EstimatorError(
                f"Expected vectors, sequences or two-dimensional feature maps at boundary {spec.name!r}, "
                f"but got rows of shape {shape}. Choose another estimator or boundary."
            )
        self._grid = (min(shape[1], _MAX_GRID), min(shape[2], _MAX_GRID)) if len(shape) == 3 else None
        width = shape[0] * self._grid[0] * self._grid[1] if self._grid else shape[-1]
        sizes = [width, *hidden_sizes, num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        start_at_zero(self.layers[-1])

    def forward(self, h: Tensor, per_position: bool) -> Tensor:
        """Class scores `[batch, classes]`, or `[batch, positions, classes]` where `per_position`."""
        if self._grid is not None:
            h = F.adaptive_avg_pool2d(h, self._grid).flatten(1)
        x: Tensor = self.layers[0](h)
        for layer in list(self.layers)[1:]:
            x = layer(F.relu(x))
        return x.mean(1) if x.ndim == 3 and not per_position else x


def summed_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy summed over rows and positions.

    Args:
        scores: `[..., classes]`.
        target: Labels `[...]`, or probabilities `[..., classes]`.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    flat_target = target.reshape(flat.shape) if target.shape == scores.shape else target.reshape(-1)
    return F.cross_entropy(flat, flat_target, reduction="sum")


def loss_and_derivative(head: ClassHead, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The head's loss on the labels, and its derivative with respect to `h`.

    Returns:
        Summed cross-entropy, the scores, and the derivative. Loss and scores keep their graph
        where the caller records one.
    """
    keeps = torch.is_grad_enabled()
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        scores = head(h, per_position=labels.ndim > 1)
        loss = summed_cross_entropy(scores, labels)
        (derivative,) = torch.autograd.grad(loss, h, retain_graph=keeps)
    return loss, scores, derivative
