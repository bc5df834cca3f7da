"""Stacks of layers with ReLU between them, of which the last starts at exactly zero."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.normalization import BatchNorm


class Stack(nn.Module):
    """A layer between each two neighbouring sizes, (batch norm and) ReLU between the layers.

    Args:
        layer: Makes a layer from its input and output size.
        sizes: Sizes from the input to the output.
        norm: Makes the batch norm of a hidden size; None for none.
    """

    def __init__(
        self,
        layer: Callable[[int, int], nn.Module],
        sizes: Sequence[int],
        norm: Callable[[int], BatchNorm] | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(sizes))
        self.norms = None if norm is None else nn.ModuleList(norm(size) for size in sizes[1:-1])
        start_at_zero(self.layers[-1])

    def forward(self, x: Tensor, added: Tensor | None = None, track: bool = False) -> Tensor:
        """The last layer's output for `x`.

        Args:
            x: What the first layer takes.
            added: What is added to the first layer's output; None for nothing.
            track: Whether running averages take note of this batch.
        """
        for k, layer in enumerate(self.layers):
            if k and self.norms is not None:
                x = self.norms[k - 1](x, track)
            x = layer(F.relu(x) if k else x)
            if not k and added is not None:
                x = x + added
        return x


def start_at_zero(layer: nn.Module) -> None:
    """Set weight and bias to zero, so that the estimator starts at exactly zero output."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def check_sizes(argument: str, sizes: Sequence[int], at_least: int = 1) -> None:
    """Refuse sizes below `at_least`.

    Raises:
        EstimatorError: A size is smaller.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise EstimatorError(
            f"Expected `{argument}` to be a list of integers, but got {sizes!r}. Pass [{sizes}]."
        )
    sizes = list(sizes)
    if not all(isinstance(size, int) and size >= at_least for size in sizes):
        raise EstimatorError(
            f"Expected `{argument}` to be at least {at_least}, but got {sizes}. Pass integers of that size."
        )
