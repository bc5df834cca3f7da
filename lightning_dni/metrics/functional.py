"""Distances between a synthetic gradient and its reference, as pure functions of two tensors."""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

# The reference is annotated "..." and not " *shape": a shape that differs from the synthetic
# gradient's is refused by `_check_shapes`, whose message says more than a type checker's.


def gradient_cosine(synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    r"""Cosine of the angle between two gradients, each flattened to one vector.

    .. math:: \frac{\langle s, t \rangle}{\lVert s \rVert \, \lVert t \rVert}

    Args:
        synthetic: The synthetic gradient, of any shape.
        true: The reference gradient, of the same shape.

    Returns:
        A 0-d tensor in [-1, 1], float64 if an input is, else float32: 0 when either gradient is
        zero, NaN when an input holds a NaN or an infinity.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> gradient_cosine(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.eye(2))
        tensor(0.9899)
    """
    cosine = _gradient_cosine_compute(*_gradient_cosine_update(synthetic, true))
    return cosine.to(_value_dtype(synthetic, true))


def gradient_row_cosine(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""Mean cosine over the rows whose true gradient is non-zero, and the share of the others.

    .. math:: \frac{1}{|R|} \sum_{i \in R} \cos(s_i, t_i), \quad R = \{i : t_i \neq 0\}

    Args:
        synthetic: The synthetic gradient, rows along dimension 0, of at least one dimension.
        true: The reference gradient, of the same shape.

    Returns:
        Two 0-d tensors, float64 if an input is, else float32. The mean is in [-1, 1]: a zero
        synthetic row counts as 0, no row with a non-zero true gradient gives 0, and a NaN or an
        infinity in any row, left out or not, gives NaN. The share of rows with a zero true gradient
        is in [0, 1], and 1 without rows; a row that holds a NaN is not zero.

    Raises:
        ValueError: If the shapes differ, or there is no dimension 0.

    Example:
        >>> synthetic = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> true = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> gradient_row_cosine(synthetic, true)
        (tensor(0.6000), tensor(0.5000))
    """
    mean, zero_share = _gradient_row_cosine_compute(*_gradient_row_cosine_update(synthetic, true))
    dtype = _value_dtype(synthetic, true)
    return mean.to(dtype), zero_share.to(dtype)


def gradient_relative_error(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    r"""Norm of the difference of two gradients, in units of the true gradient's norm.

    .. math:: \frac{\lVert s - t \rVert}{\lVert t \rVert}

    Args:
        synthetic: The synthetic gradient, of any shape.
        true: The reference gradient, of the same shape.

    Returns:
        A 0-d tensor in [0, inf], float64 if an input is, else float32: 0 when both gradients are
        zero, inf when only the true one is, NaN when an input holds a NaN or an infinity.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> gradient_relative_error(torch.tensor([3.0, 1.0]), torch.tensor([3.0, 4.0]))
        tensor(0.6000)
    """
    error = _norm_quotient_compute(*_gradient_relative_error_update(synthetic, true))
    return error.to(_value_dtype(synthetic, true))


def gradient_norm_ratio(synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    r"""Norm of the synthetic gradient, in units of the true gradient's norm.

    .. math:: \frac{\lVert s \rVert}{\lVert t \rVert}

    Args:
        synthetic: The synthetic gradient, of any shape.
        true: The reference gradient, of the same shape.

    Returns:
        A 0-d tensor in [0, inf], float64 if an input is, else float32: 0 when both gradients are
        zero, inf when only the true one is, NaN when an input holds a NaN or an infinity.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> gradient_norm_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
        tensor(2.5000)
    """
    ratio = _norm_quotient_compute(*_gradient_norm_ratio_update(synthetic, true))
    return ratio.to(_value_dtype(synthetic, true))


def gradient_sign_agreement(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    r"""Share of entries with the sign of the true gradient, among those where that is non-zero.

    .. math:: \frac{|\{i \in E : \mathrm{sign}\, s_i = \mathrm{sign}\, t_i\}|}{|E|}, \quad
        E = \{i : t_i \neq 0\}

    Args:
        synthetic: The synthetic gradient, of any shape; an entry of zero agrees with no sign.
        true: The reference gradient, of the same shape.

    Returns:
        A 0-d tensor in [0, 1], float64 if an input is, else float32: 0 when the true gradient is
        zero, NaN when an input holds a NaN or an infinity.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> true = torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0])
        >>> gradient_sign_agreement(torch.tensor([0.1, -9.0, -1.0, 1.0, 0.0]), true)
        tensor(0.5000)
    """
    share = _gradient_sign_agreement_compute(*_gradient_sign_agreement_update(synthetic, true))
    return share.to(_value_dtype(synthetic, true))


def _gradient_cosine_update(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the dot product and the two squared norms."""
    synthetic, true = _aligned(synthetic, true)
    return (synthetic * true).sum(), synthetic.square().sum(), true.square().sum()


def _gradient_cosine_compute(
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


def _gradient_row_cosine_update(
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
    cosine = _gradient_cosine_compute((synthetic * true).sum(1), synthetic.square().sum(1), true_square)
    zero = true_square == 0
    rows = zero.new_full((), len(zero), dtype=torch.int64)
    return cosine.sum(), rows, zero.sum()


def _gradient_row_cosine_compute(
    cosine_sum: Float[Tensor, ""], rows: Real[Tensor, ""], zero_rows: Real[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean over the rows that are not zero, and the share of those that are."""
    nonzero = (rows - zero_rows).to(cosine_sum.dtype)
    # a zero true row has added a cosine of 0, so without other rows this is 0 / 1
    return cosine_sum / nonzero.clamp(min=1), 1 - nonzero / rows.clamp(min=1)


def _gradient_relative_error_update(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the squared norms of the difference and of the true gradient."""
    synthetic, true = _aligned(synthetic, true)
    # |s|^2 - 2 s.t + |t|^2 would cancel to noise just when the synthetic gradient is good
    return (synthetic - true).square().sum(), true.square().sum()


def _gradient_norm_ratio_update(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the squared norms of the two gradients."""
    synthetic, true = _aligned(synthetic, true)
    return synthetic.square().sum(), true.square().sum()


def _norm_quotient_compute(square: Float[Tensor, ""], true_square: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the quotient of two norms: 0 for a zero numerator, inf for a zero denominator only."""
    zero = square == 0
    quotient = torch.where(zero, 0.0, _root(square, zero) / _root(true_square, zero))
    return _nan_unless_finite(quotient, square, true_square)


def _gradient_sign_agreement_update(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Real[Tensor, ""]]:
    """Return the number of agreeing entries, or NaN, and of entries with a non-zero reference."""
    _check_shapes(synthetic, true)
    nonzero = true != 0
    agreeing = (nonzero & (synthetic.sign() == true.sign())).sum()
    # comparisons and counts drop a NaN, so it has to be put back; an integer could not hold it
    finite = synthetic.isfinite().all() & true.isfinite().all()
    return torch.where(finite, agreeing.to(_sum_dtype(true)), torch.nan), nonzero.sum()


def _gradient_sign_agreement_compute(
    agreeing: Float[Tensor, ""], nonzero: Real[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the share of agreeing entries."""
    return agreeing / nonzero.clamp(min=1)


def _check_shapes(synthetic: Tensor, true: Tensor) -> None:
    if synthetic.shape != true.shape:
        raise ValueError(
            "Expected argument `true` to have the shape of `synthetic`, "
            f"{tuple(synthetic.shape)}, but got {tuple(true.shape)}. "
            "Pass two gradients of the same activation."
        )


def _aligned(synthetic: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return both gradients in the precision of the sums, once their shapes agree."""
    _check_shapes(synthetic, true)
    return synthetic.to(_sum_dtype(synthetic)), true.to(_sum_dtype(true))


def _sum_dtype(gradient: Tensor) -> torch.dtype:
    # The square of a float32 below 1e-23 is zero in float32, and a vanishing gradient would be
    # reported as none. In float64 no float32 or half overflows or vanishes. MPS has no float64.
    return torch.float32 if gradient.device.type == "mps" else torch.float64


def _value_dtype(synthetic: Tensor, true: Tensor) -> torch.dtype:
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
