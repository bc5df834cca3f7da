"""What an estimator adds for its context: a trained vector per class, or a linear map of a continuous one."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.errors import EstimatorError


class Conditioning(nn.Module):
    """Adds to `x` a linear function of the context, starting at exactly zero.

    For labels it is the product of a weight and the one-hot label, computed by looking the row up;
    so `x W + y V` is the linear estimator of Czarnecki et al. 2017, section 2, without building `[x, y]`.

    Args:
        features: Width of `x`.
        num_classes: Number of classes, for labels `[batch]` or `[batch, positions]`.
        context_size: Width of a continuous context `[batch, context_size]` or
            `[batch, positions, context_size]`.

    Raises:
        EstimatorError: Both kinds of context are asked for, or one of no size.
    """

    weight: nn.Parameter | None

    def __init__(self, features: int, num_classes: int | None, context_size: int | None) -> None:
        super().__init__()
        if num_classes is not None and context_size is not None:
            raise EstimatorError(
                f"Expected `num_classes` or `context_size`, but got both ({num_classes}, {context_size})."
            )
        size = context_size if num_classes is None else num_classes
        if size is not None and size < 1:
            raise EstimatorError(
                f"Expected `num_classes` and `context_size` to be at least 1, but got {size}."
            )
        self._continuous = num_classes is None
        self.weight = None if size is None else nn.Parameter(torch.zeros(size, features))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """`x` of shape `[batch, ..., features]` plus what the context adds to every position."""
        if self.weight is None or context is None:
            return x
        if self._continuous:
            added = context.to(x.dtype) @ self.weight
        else:
            added = F.embedding(context, self.weight)
        while added.ndim < x.ndim:
            added = added.unsqueeze(-2)
        return x + added


def joint_width(spec: BoundarySpec) -> int:
    """Width of all leaves side by side on the last dimension.

    Raises:
        EstimatorError: The leaves cannot be laid side by side, or have no feature dimension.
    """
    shapes = [leaf.shape for leaf in spec.leaves]
    if any(not shape for shape in shapes) or len({shape[:-1] for shape in shapes}) != 1:
        raise EstimatorError(
            f"Expected activations with features on the last dimension and otherwise equal shapes at "
            f"boundary {spec.name!r}, but got rows of shapes {shapes}. Choose another boundary."
        )
    return sum(shape[-1] for shape in shapes)


def join(h: tuple[Tensor, ...]) -> Tensor:
    """Lay the leaves side by side on the last dimension."""
    return h[0] if len(h) == 1 else torch.cat(h, dim=-1)


def split(joined: Tensor, h: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Undo `join` for a tensor of the joint shape."""
    if len(h) == 1:
        return (joined,)
    return torch.split_with_sizes(joined, [leaf.shape[-1] for leaf in h], dim=-1)
