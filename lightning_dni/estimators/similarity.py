"""Similarity matching: rows of one class shall have like activations, rows of others unlike ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.context import is_padding
from lightning_dni.estimators.conditioning import check_aligned


class SimilarityMatching(nn.Module):
    """Squared difference of two similarity matrices, that of the activation and that of the labels.

    The similarity of two rows is the cosine of what a trained linear map (for feature maps: a 3 x 3
    convolution, then the standard deviation over space; for sequences: the map, then the mean over positions)
    makes of them, less its mean over features (Nokland and Eidnes 2019).

    Args:
        spec: The boundary's spec; vectors, sequences or two-dimensional feature maps.
        num_classes: Number of classes; one label for each row.
        ignore_index: The label of padding: such a row is in no pair.
    """

    def __init__(self, spec: BoundarySpec, num_classes: int, ignore_index: int | None = None) -> None:
        super().__init__()
        self._boundary, self._different = spec.name, -1.0 / (num_classes - 1)
        self._ignore_index = ignore_index
        width = spec.shape[0] if len(spec.shape) == 3 else spec.shape[-1]
        self.map: nn.Module = (
            nn.Conv2d(width, width, 3, padding=1, bias=False)
            if len(spec.shape) == 3
            else nn.Linear(width, width, bias=False)
        )

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """Mean over all pairs of rows; with padding a row's mean over its pairs, averaged over all rows.

        Raises:
            EstimatorError: There is not one label for each row.
        """
        check_aligned(labels.shape, h.shape[:1], self._boundary)
        x = _features(self.map(h))
        x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-8)
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        wanted = same.to(x.dtype) * (1.0 - self._different) + self._different
        if self._ignore_index is None:
            return F.mse_loss(x @ x.t(), wanted, reduction="sum") / max(1, wanted.numel())
        padding = is_padding(labels, self._ignore_index)
        unpaired = padding.unsqueeze(0) | padding.unsqueeze(1)
        squares = (x @ x.t() - wanted).masked_fill(unpaired, 0.0).square()
        return squares.sum() / ((~padding).sum().clamp(min=1) * max(1, len(h)))

    def gradient(self, h: Tensor, labels: Tensor) -> Tensor:
        """The derivative with respect to `h` of the loss times the number of rows."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (derivative,) = torch.autograd.grad(self(h, labels) * h.shape[0], h)
        return derivative


def _features(x: Tensor) -> Tensor:
    """One vector for each row."""
    if x.ndim == 3:
        return x.mean(1)
    if x.ndim == 4 and x.shape[2] * x.shape[3] > 1:
        return x.flatten(2).std(2)
    return x.flatten(1)
