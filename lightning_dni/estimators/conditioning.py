"""What an estimator adds for its context: a trained vector per class, or a linear map of a continuous one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.context import is_padding
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.layers import check_sizes


class Conditioning(nn.Module):
    """A linear function of the context, to be added to a linear function of `h`.

    For labels it is the product of the one-hot label and a weight, computed by looking the row up; so
    `hA + yB` of Czarnecki et al. 2017, section 2, needs no `[h, y]`, and no one-hot of a vocabulary.

    Args:
        spec: The boundary's spec.
        features: Width of what it is added to.
        num_classes: Number of classes, for labels `[batch]` or `[batch, positions]`.
        context_size: Width of a continuous context `[batch, context_size]` or
            `[batch, positions, context_size]`.
        zero: Whether it starts at zero. Otherwise it starts with about as much weight as the whole of
            an `h` of unit scale has in `nn.Linear`; as one feature among many it would hardly count.
        ignore_index: The label of padding, for which anything may be given; what is made of it is then made
            zero by `mask_padding`.

    Raises:
        EstimatorError: Both kinds of context are asked for, or one of no size.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        spec: BoundarySpec,
        features: int,
        num_classes: int | None,
        context_size: int | None,
        zero: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None and context_size is not None:
            raise EstimatorError(
                f"Expected `num_classes` or `context_size` for boundary {spec.name!r}, but got both "
                f"({num_classes}, {context_size})."
            )
        self._boundary = spec.name
        self._continuous, self._ignore_index = num_classes is None, ignore_index
        if self._continuous and ignore_index is not None:
            raise EstimatorError(
                f"Expected `num_classes` with `ignore_index` for boundary {spec.name!r}, but got none. Pass "
                "`num_classes=`: it is the label of padding."
            )
        size = context_size if num_classes is None else num_classes
        if size is None:
            self.weight = None
            return
        check_sizes("context_size" if self._continuous else "num_classes", [size])
        self.weight = nn.Parameter(torch.zeros(size, features))
        if not zero:
            nn.init.normal_(self.weight, std=size**-0.5 if self._continuous else 1.0)

    def forward(self, context: Tensor | None, h: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """What to add at every position of `h` `[batch, ..., features]`; None for nothing.

        With `bias` `[features]` that is added, too: to the table of labels or to what they look up, whichever
        has fewer rows.
        """
        if self.weight is None or context is None:
            return None
        if self._continuous:
            check_aligned(context.shape[:-1], h.shape[:-1], self._boundary)
            added = F.linear(context.to(h.dtype), self.weight.t(), bias)
        else:
            check_aligned(context.shape, h.shape[:-1], self._boundary)
            labels = to_look_up(context, self._ignore_index)
            if bias is not None and len(self.weight) <= labels.numel():
                added = F.embedding(labels, self.weight + bias)
            else:
                added = F.embedding(labels, self.weight)
                added = added if bias is None else added + bias
        while added.ndim < h.ndim:
            added = added.unsqueeze(-2)
        return added

    def parameter_gradients(
        self, context: Tensor | None, derivative: Tensor, scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Gradient of the weight for `scale` times the `derivative` `[batch, ..., features]` of the sum."""
        if self.weight is None or context is None:
            return []
        given = context.ndim - self._continuous  # dimensions that have a context each
        shared = tuple(range(given, derivative.ndim - 1))
        d = (derivative.sum(shared) if shared else derivative).flatten(0, -2)
        if self._continuous:
            return [(self.weight, (context.flatten(0, -2).to(d.dtype).t() @ d).mul_(scale))]
        # as embedding's own backward: the same numbers on every device, where an index_add has none
        labels, classes = to_look_up(context, self._ignore_index).flatten(), self.weight.shape[0]
        found = torch.ops.aten.embedding_dense_backward(d, labels, classes, -1, False)
        return [(self.weight, found.mul_(scale))]


def to_look_up(labels: Tensor, ignore_index: int | None) -> Tensor:
    """The labels as indices, class 0 in place of padding; what is made of that is for the caller to drop."""
    labels = labels.long()
    return labels if ignore_index is None else labels.masked_fill(is_padding(labels, ignore_index), 0)


def mask_padding(x: Tensor, context: Tensor | None, ignore_index: int | None) -> Tensor:
    """`x` `[batch, ..., features]`, zero for the rows or positions whose label is `ignore_index`.

    >>> import torch
    >>> mask_padding(torch.ones(1, 3, 2), torch.tensor([[4, -100, 7]]), ignore_index=-100).sum(-1)
    tensor([[2., 0., 2.]])
    """
    if context is None or ignore_index is None:
        return x
    padding = is_padding(context, ignore_index)
    return x.masked_fill(padding.view(*padding.shape, *[1] * (x.ndim - padding.ndim)), 0.0)


def check_aligned(context: Sequence[int], rows: Sequence[int], boundary: str) -> None:
    """Refuse a context that would be broadcast in a way that nobody meant.

    Args:
        context: Its shape, without the width of a continuous one.
        rows: Batch size, and number of positions where a context may be given for each.
        boundary: Named in the error.

    Raises:
        EstimatorError: `context` is no non-empty beginning of `rows`.
    """
    allowed = [tuple(rows[:n]) for n in range(1, len(rows) + 1)]
    if tuple(context) not in allowed:
        raise EstimatorError(
            f"Expected a label or context for each row or position at boundary {boundary!r}, of shape "
            f"{' or '.join(map(str, allowed))}, but got {tuple(context)}. Pass `labels=` a callable that "
            "gives that shape."
        )


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
