"""A small classifier on an activation, whose loss has a derivative with respect to that activation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.context import is_padding
from lightning_dni.core.estimator import Record, rows_of
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import check_aligned, to_look_up
from lightning_dni.estimators.layers import Stack, check_sizes

_NO_LABEL = torch.iinfo(torch.int64).min
_MAX_GRID = 4
"""Feature maps are averaged to at most this many cells a side, so that the head stays small."""


class ClassHead(nn.Module):
    """Predicts class scores from one activation; its last layer starts at exactly zero.

    `[batch, features]` goes in as it is. `[batch, positions, features]` goes in position by position;
    one label per sample meets the average of the positions' scores, one label per position its own
    score. `[batch, channels, height, width]` is averaged to a grid of at most 4 x 4.

    Args:
        spec: The boundary's spec.
        num_classes: Number of classes, at least two.
        hidden_sizes: Widths of hidden layers (linear, ReLU).
        ignore_index: The label of padding: its cross-entropy is exactly zero, as is every derivative of it.

    Raises:
        EstimatorError: The activation has another form, or a size is out of range.
    """

    def __init__(
        self,
        spec: BoundarySpec,
        num_classes: int,
        hidden_sizes: Sequence[int],
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes("num_classes", [num_classes], at_least=2)
        check_sizes("hidden_sizes", hidden_sizes)
        shape = spec.shape
        if len(shape) not in (1, 2, 3):
            raise EstimatorError(
                f"Expected vectors, sequences or two-dimensional feature maps at boundary {spec.name!r}, "
                f"but got rows of shape {shape}. Choose another estimator or boundary."
            )
        self._boundary, self._ignore_index = spec.name, ignore_index
        self._grid = (min(shape[1], _MAX_GRID), min(shape[2], _MAX_GRID)) if len(shape) == 3 else None
        width = shape[0] * self._grid[0] * self._grid[1] if self._grid else shape[-1]
        self.stack = Stack(nn.Linear, [width, *hidden_sizes, num_classes])

    def forward(self, h: Tensor, per_position: bool) -> Tensor:
        """Class scores `[batch, classes]`, or `[batch, positions, classes]` where `per_position`."""
        x: Tensor = self.stack(h if self._grid is None else average_to_grid(h, self._grid).flatten(1))
        return x.mean(1) if x.ndim == 3 and not per_position else x

    def gradient(self, h: Tensor, labels: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
        """The derivative of the labels' cross-entropy with respect to `h`, and the scores.

        The cross-entropy is summed over rows and positions. The scores keep their graph where the caller
        records one.

        Args:
            h: The activation.
            labels: One for each row, or for each position.
            twice: Whether the derivative keeps its graph, too.

        Raises:
            EstimatorError: There is not one label for each row or position.
        """
        check_aligned(labels.shape, h.shape[: 2 if h.ndim == 3 else 1], self._boundary)
        keeps = torch.is_grad_enabled()
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            scores = self(h, per_position=labels.ndim > 1)
            loss = summed_cross_entropy(scores, labels, self._ignore_index)
            (derivative,) = torch.autograd.grad(loss, h, retain_graph=keeps, create_graph=keeps and twice)
        return derivative, scores if keeps else scores.detach()

    def loss(self, record: Record, target: Tensor) -> Tensor:
        """Cross-entropy of the scores in `record` on `target`, averaged over rows.

        Args:
            record: Its state is the scores that `gradient` gave; made again where their graph was not kept.
            target: Labels, or probabilities of the classes.
        """
        summed = summed_cross_entropy(self.scores_in(record), target, self._ignore_index)
        return summed / max(1, rows_of(record.h))

    def followed(
        self, output: Tensor, scores: Tensor, labels: Tensor | None, share: float, who: str
    ) -> Tensor:
        """Probabilities of the network's output, with the labels' share, for the scores to follow.

        Args:
            output: What the network gave.
            scores: Those of this head.
            labels: Of the same rows.
            share: As in `share_labels`.
            who: The estimator, named in the error.

        Raises:
            EstimatorError: The output has another shape than the scores.
        """
        check_scores(output, scores, who)
        return share_labels(output.to(scores.dtype), labels, share, self._ignore_index)

    def scores_in(self, record: Record) -> Tensor:
        """The scores that `gradient` gave, made again where their graph was not kept."""
        scores: Tensor = record.state
        return scores if scores.requires_grad else self(record.h[0], per_position=scores.ndim == 3)


def summed_cross_entropy(scores: Tensor, target: Tensor, ignore_index: int | None = None) -> Tensor:
    """Cross-entropy summed over rows and positions.

    Args:
        scores: `[..., classes]`.
        target: Labels `[...]`, or probabilities `[..., classes]`, which are zero at padding.
        ignore_index: The label of padding, which counts nothing.
    """
    if not target.is_floating_point():
        return cross_entropy(scores, target, ignore_index, "sum")
    return F.cross_entropy(scores.flatten(0, -2), target.flatten(0, -2), reduction="sum")


def cross_entropy(scores: Tensor, labels: Tensor, ignore_index: int | None, reduction: str) -> Tensor:
    """Cross-entropy of all labels, of any type of integer, zero for those of padding.

    Args:
        scores: `[..., classes]`.
        labels: `[...]`.
        ignore_index: The label of padding. Without one -100 is none either, as it is by torch's default.
        reduction: "sum", or "none" for one number for each label, laid flat.
    """
    ignored = _NO_LABEL if ignore_index is None else ignore_index
    flat = labels.flatten().long()
    return F.cross_entropy(scores.flatten(0, -2), flat, ignore_index=ignored, reduction=reduction)


def check_share(argument: str, share: float) -> None:
    """Refuse a share that is not from 0 to 1.

    Raises:
        EstimatorError: It is not.
    """
    if not 0.0 <= share <= 1.0:
        raise EstimatorError(f"Expected `{argument}` to be from 0 to 1, but got {share!r}.")


def share_labels(
    scores: Tensor, labels: Tensor | None, share: float, ignore_index: int | None = None
) -> Tensor:
    """Probabilities `[..., classes]` of the scores, of which the labels `[...]` are given a share.

    It is one tensor of the width of a vocabulary, and no one-hot beside it. It is zero where the label is
    `ignore_index`: cross-entropy on that is zero, and so is its derivative.

    >>> import torch
    >>> share_labels(torch.zeros(2, 2), torch.tensor([1, -100]), share=0.5, ignore_index=-100)
    tensor([[0.2500, 0.7500],
            [0.0000, 0.0000]])
    """
    probabilities = torch.softmax(scores, dim=-1)
    if labels is None:
        return probabilities
    if share:
        place = to_look_up(labels, ignore_index).unsqueeze(-1)
        zero, one = probabilities.new_zeros(()), probabilities.new_ones(())
        at_labels = probabilities.gather(-1, place).lerp_(one, share)
        probabilities = probabilities.lerp_(zero, share).scatter_(-1, place, at_labels)
    if ignore_index is None:
        return probabilities
    return probabilities.masked_fill_(is_padding(labels, ignore_index).unsqueeze(-1), 0.0)


def check_scores(output: Tensor, scores: Tensor, who: str) -> None:
    """Refuse an output of the network that is no score for every score of a head.

    Args:
        output: What the network gave.
        scores: What the head gave for the same rows.
        who: The estimator, named in the error.

    Raises:
        EstimatorError: It has another shape.
    """
    if output.shape != scores.shape:
        raise EstimatorError(
            f"Expected the network's output for {who} to be class scores of shape {tuple(scores.shape)}, but "
            f"got {tuple(output.shape)}. Pass `output=` the submodule that gives the scores."
        )


def average_to_grid(h: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling as two products, which unlike torch's is deterministic on every device.

    Args:
        h: Maps `[batch, channels, height, width]`.
        grid: Cells along height and width.
    """
    rows, columns = (_averages(size, cells, h) for size, cells in zip(h.shape[2:], grid, strict=True))
    return torch.einsum("ih,bchw,jw->bcij", rows, h, columns)


def _averages(size: int, cells: int, like: Tensor) -> Tensor:
    place = torch.arange(size, device=like.device)
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    first, end = cell * size // cells, -((cell + 1) * -size // cells)
    inside = ((place >= first) & (place < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
