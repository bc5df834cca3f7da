"""Sums over two gradients of the same activation, and the distances that follow from them."""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor


def cosine_sums(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the dot product and the two squared norms."""
    synthetic, true = _aligned(synthetic, true)
    return (synthetic * true).sum(), synthetic.square().sum(), true.square().sum()


def cosine_of(
    dot: Float[Tensor, " *rows"],
    synthetic_square: Float[Tensor, " *rows"],
    true_square: Float[Tensor, " *rows"],
) -> Float[Tensor, " *rows"]:
    """Return the cosine, elementwise."""
    zero = (synthetic_square == 0) | (true_square == 0)
    # two roots: the product of the squares has twice the exponent and may leave the range
    norms = _root(synthetic_square, zero) * _root(true_square, zero)
    # rounding may pass 1 by an ulp
    cosine = torch.where(zero, 0.0, dot / norms).clamp(-1.0, 1.0)
    return _nan_unless_finite(cosine, synthetic_square, true_square)


def row_cosine_sums(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Real[Tensor, ""], Real[Tensor, ""]]:
    """Return the sum of the row cosines, the number of rows and the number of zero true rows."""
    synthetic, true = _aligned(synthetic, true)
    if synthetic.ndim == 0:
        raise ValueError(
            "Expected arguments `synthetic` and `true` to have rows along dimension 0, "
            "but got 0-d tensors. `gradient_cosine` compares tensors of any shape."
        )
    # the extra dimension makes a row of a vector's entry, for which flatten(1) alone has no place
    synthetic, true = synthetic.unsqueeze(-1).flatten(1), true.unsqueeze(-1).flatten(1)
    true_square = true.square().sum(1)
    cosine = cosine_of((synthetic * true).sum(1), synthetic.square().sum(1), true_square)
    zero = true_square == 0
    rows = zero.new_full((), len(zero), dtype=torch.int64)
    return cosine.sum(), rows, zero.sum()


def row_cosine_of(
    cosine_sum: Float[Tensor, ""], rows: Real[Tensor, ""], zero_rows: Real[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean over the rows that are not zero, and the share of those that are."""
    nonzero = (rows - zero_rows).to(cosine_sum.dtype)
    # a zero true row has added a cosine of 0, so without other rows this is 0 / 1
    return cosine_sum / nonzero.clamp(min=1), 1 - nonzero / rows.clamp(min=1)


def difference_sums(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the squared norms of the difference and of the true gradient."""
    synthetic, true = _aligned(synthetic, true)
    # |s|^2 - 2 s.t + |t|^2 would cancel to noise just when the synthetic gradient is good
    return (synthetic - true).square().sum(), true.square().sum()


def norm_sums(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the squared norms of the two gradients."""
    synthetic, true = _aligned(synthetic, true)
    return synthetic.square().sum(), true.square().sum()


def norm_quotient(square: Float[Tensor, ""], true_square: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the quotient of two norms: 0 for a zero numerator, inf for a zero denominator only."""
    zero = square == 0
    quotient = torch.where(zero, 0.0, _root(square, zero) / _root(true_square, zero))
    return _nan_unless_finite(quotient, square, true_square)


def check_shapes(synthetic: Tensor, true: Tensor) -> None:
    """Refuse two gradients that are not of the same activation.

    Raises:
        ValueError: If the shapes differ.
    """
    if synthetic.shape != true.shape:
        raise ValueError(
            "Expected argument `true` to have the shape of `synthetic`, "
            f"{tuple(synthetic.shape)}, but got {tuple(true.shape)}. "
            "Pass two gradients of the same activation."
        )


def _aligned(synthetic: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return both gradients in the precision of the sums, once their shapes agree."""
    check_shapes(synthetic, true)
    return synthetic.to(sum_dtype(synthetic)), true.to(sum_dtype(true))


def sum_dtype(gradient: Tensor) -> torch.dtype:
    """Return the precision of sums over `gradient`."""
    # The square of a float32 below 1e-23 is zero in float32, and a vanishing gradient would be
    # reported as none. In float64 no float32 or half overflows or vanishes. MPS has no float64.
    return torch.float32 if gradient.device.type == "mps" else torch.float64


def value_dtype(synthetic: Tensor, true: Tensor) -> torch.dtype:
    """Return the precision of a distance between the two."""
    return torch.float64 if torch.float64 in (synthetic.dtype, true.dtype) else torch.float32


def _root(square: Float[Tensor, " *rows"], unused: Bool[Tensor, " *rows"]) -> Float[Tensor, " *rows"]:
    """Square root; 1 where it is unused, since the infinite derivative at 0 turns into NaN."""
    return torch.where(unused, 1.0, square).sqrt()


def _nan_unless_finite(
    value: Float[Tensor, " *rows"], *squares: Float[Tensor, " *rows"]
) -> Float[Tensor, " *rows"]:
    """Return NaN where a squared norm is not finite, whatever convention chose the value."""
    for square in squares:
        value = torch.where(square.isfinite(), value, torch.nan)
    return value
