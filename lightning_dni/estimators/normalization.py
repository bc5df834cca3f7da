"""Batch normalization that can be computed twice for one batch, and for a single row."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """Batch normalization over every dimension of `x` but the features.

    A batch is normalized by its own statistics, whether or not the running averages take note of it;
    so an estimator whose graph is built again for its loss sees the same numbers and counts them once.
    The averages leave out a batch whose statistics are not finite, since they would never recover.
    A single row has no variance: it is normalized by the running averages, and they stay.

    Args:
        features: Number of features.
        feature_dim: 1 for maps `[batch, features, ...]`, -1 for `[batch, ..., features]`.

    Attributes:
        frozen: Whether every batch is normalized by the running averages, so that no row depends on another.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, feature_dim: int = 1) -> None:
        super().__init__()
        self._feature_dim, self.frozen = feature_dim, False
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, track: bool = False) -> Tensor:
        """Normalize `x`; the running averages follow where `track`."""
        flat = x if self._feature_dim == 1 else x.reshape(-1, x.shape[-1])
        single = self.frozen or flat.numel() == flat.shape[1]
        mean, var = self.running_mean.clone(), self.running_var.clone()
        normalized = F.batch_norm(flat, mean, var, self.weight, self.bias, training=not single)
        if track and not single:
            self._follow(mean, var)
        return normalized.view(x.shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Take over these averages if they are finite, without waiting for the device."""
        sound = (mean.sum() + var.sum()).isfinite()
        self.running_mean.copy_(torch.where(sound, mean, self.running_mean))
        self.running_var.copy_(torch.where(sound, var, self.running_var))
