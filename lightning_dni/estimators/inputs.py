"""The multilayer input estimator of a complete unlock."""

import math
from collections.abc import Sequence
from functools import partial
from typing import final

from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.inputs import InputEstimator
from lightning_dni.estimators.layers import Stack, check_sizes
from lightning_dni.estimators.normalization import BatchNorm


@final
class MLPInputEstimator(InputEstimator):
    """Hidden layers (linear, batch norm, ReLU), then a linear layer that starts at exactly zero.

    Input and activation are each one vector per row, whatever their form.

    Args:
        spec: The boundary's spec, with the network's input.
        hidden_sizes: Widths of the hidden layers.
        batch_norm: Whether hidden layers are normalized, over rows.

    Raises:
        EstimatorError: A width is not positive.
    """

    def __init__(
        self, spec: BoundarySpec, hidden_sizes: Sequence[int] = (256,), batch_norm: bool = True
    ) -> None:
        super().__init__()
        check_sizes("hidden_sizes", hidden_sizes)
        assert spec.input is not None
        self._shapes = [leaf.shape for leaf in spec.leaves]
        self._widths = [math.prod(shape) for shape in self._shapes]
        sizes = [math.prod(spec.input.shape), *hidden_sizes, sum(self._widths)]
        self.stack = Stack(nn.Linear, sizes, partial(BatchNorm, feature_dim=-1) if batch_norm else None)

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """The network's prediction from `x` `[batch, ...]`."""
        said = self.stack(x.reshape(len(x), -1), track=True).split(self._widths, dim=1)
        return tuple(part.reshape(-1, *shape) for part, shape in zip(said, self._shapes, strict=True))
