"""The artificial data of Czarnecki et al. 2017, section 4: our stand-in for its supplement D."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["separable", "noisy", "xor", "random"]

NOISY_SHARE = 0.1
"""Share of the rows of "noisy" whose label is drawn again."""


class ArtificialData(NamedTuple):
    """Rows and their binary labels.

    Attributes:
        x: Standard normal inputs, `[rows, features]`.
        y: Labels 0 or 1 as numbers, `[rows, 1]`.
    """

    x: Tensor
    y: Tensor


def artificial_data(
    kind: Kind, features: int, rows: int = 400, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ArtificialData:
    """Binary labels of one of four kinds; the paper's own definitions and sizes are not known to us.

    Args:
        kind: "separable" by a random hyperplane through the origin; "noisy": the same with a tenth of the
            labels drawn again; "xor": whether the first two inputs have different signs; "random".
        features: Number of inputs, at least 2.
        rows: Number of rows.
        seed: Of the generator; the global one is left alone.
        dtype: Precision.

    Raises:
        ValueError: There is no such kind, or too few features or rows.

    Example:
        >>> x, y = artificial_data("xor", features=2, rows=5)
        >>> bool(((x[:, :1] * x[:, 1:] < 0) == (y == 1)).all())
        True
    """
    if kind not in get_args(Kind):
        raise ValueError(
            f"Expected `kind` to be one of {get_args(Kind)}, but got {kind!r}. Choose one of them."
        )
    if features < 2 or rows < 1:
        raise ValueError(
            f"Expected `features` of at least 2 and `rows` of at least 1, but got {features} and {rows}. "
            "Two inputs are what XOR needs."
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    normal = torch.randn(features, generator=generator, dtype=torch.float64)
    coin = torch.randint(2, (rows,), generator=generator).double()
    chosen = torch.rand(rows, generator=generator) < NOISY_SHARE
    side = (x @ normal > 0).double()
    labels: dict[Kind, Tensor] = {
        "separable": side,
        "noisy": torch.where(chosen, coin, side),
        "xor": (x[:, 0] * x[:, 1] < 0).double(),
        "random": coin,
    }
    return ArtificialData(x.to(dtype), labels[kind].unsqueeze(1).to(dtype))


def one_hot(labels: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 2"]:
    """Binary labels as vectors of two classes."""
    return torch.cat([1 - labels, labels], dim=1)
