"""Random matrices that never change, and how an error at the output meets an activation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dni.core.randomness import derive_seed
from lightning_dni.errors import EstimatorError


class FixedMatrices(nn.Module):
    """Random matrices by name, drawn when first asked for; their seed is saved in place of them.

    Attributes:
        drawn: Those that were asked for so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seed = int(torch.randint(2**62, ()))
        self.drawn: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The matrix `name`, distributed as torch initializes a weight of that shape.

        Args:
            name: Whatever tells it from others.
            shape: Of a linear layer's or a convolution's weight.
            like: A tensor of its dtype and device.
        """
        found = self.drawn.get(name)
        if found is None or found.shape != tuple(shape):
            generator = torch.Generator().manual_seed(derive_seed(self._seed, name, *shape))
            found = torch.empty(tuple(shape), device="cpu", dtype=torch.float32)
            nn.init.kaiming_uniform_(found, a=math.sqrt(5), generator=generator)
        if found.dtype != like.dtype or found.device != like.device:
            found = found.to(like)
        self.drawn[name] = found
        return found

    def get_extra_state(self) -> Tensor:
        """The seed."""
        return torch.tensor(self._seed)

    def set_extra_state(self, state: Any) -> None:
        """Go on with the matrices of another seed."""
        self._seed = int(state)
        self.drawn.clear()


def lay_out(error: Tensor, h: Tensor, boundary: str) -> Tensor:
    """The output's error beside `h`, so that a product with a matrix on its last dimension is one of `h`.

    Args:
        error: `[batch, ...]`.
        h: `[batch, features]`; `[batch, positions, features]`, which share the matrix; or maps
            `[batch, channels, height, ...]`, laid flat.
        boundary: Named in the error.

    Returns:
        `[batch, outputs]`, or `[batch, positions or 1, outputs]` where `h` has positions.

    Raises:
        EstimatorError: The output has other rows than `h`.
    """
    if error.shape[0] != h.shape[0]:
        raise EstimatorError(
            f"Expected `output` to give one row for each of the {h.shape[0]} rows of the activation at "
            f"boundary {boundary!r}, but got an output of shape {tuple(error.shape)}. Name a module whose "
            "output keeps the batch as its first dimension."
        )
    if h.ndim != 3:
        return error.flatten(1)
    if error.ndim == 3 and error.shape[1] == h.shape[1]:
        return error
    return error.flatten(1).unsqueeze(1)


def width_of(h: Tensor) -> int:
    """Number of features that a position, or a row without positions, has."""
    return h.shape[-1] if h.ndim == 3 else math.prod(h.shape[1:])


def spread(given: Tensor, h: Tensor) -> Tensor:
    """What was made for each row or position, in the shape of `h`."""
    return given.expand_as(h) if h.ndim == 3 else given.view_as(h)
