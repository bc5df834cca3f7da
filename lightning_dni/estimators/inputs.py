"""The multilayer input estimator of a complete unlock."""

import math
from collections.abc import Sequence
from functools import partial
from typing import final

from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.inputs import InputEstimator
from lightning_dni.errors import EstimatorError
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
        self._boundary, self._input = spec.name, spec.input.shape
        self._shapes = [leaf.shape for leaf in spec.leaves]
        self._widths = [math.prod(shape) for shape in self._shapes]
        sizes = [math.prod(spec.input.shape), *hidden_sizes, sum(self._widths)]
        self.stack = Stack(nn.Linear, sizes, partial(BatchNorm, feature_dim=-1) if batch_norm else None)

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """The network's prediction from `x` `[batch, ...]`.

        Raises:
            EstimatorError: The input has not the shape of the first one.
        """
        if x.shape[1:] != self._input:
            raise EstimatorError(
                f"Expected rows of shape {tuple(self._input)} of the network's input for the "
                f"MLPInputEstimator at boundary {self._boundary!r}, as on the first batch, but got "
                f"{tuple(x.shape[1:])}. Pass `network_input=` a callable that gives rows of one shape, or "
                "leave the boundary out: "
                f"synthetic_inputs={{{self._boundary!r}: None, ...}}."
            )
        rows = len(x)
        said = self.stack(x.reshape(rows, math.prod(self._input)), track=True).split(self._widths, dim=1)
        return tuple(part.reshape(rows, *shape) for part, shape in zip(said, self._shapes, strict=True))
