"""Distances between a synthetic gradient and its reference, as pure functions of two tensors."""

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lightning_dni.core.distance import (
    check_shapes,
    cosine_of,
    cosine_sums,
    difference_sums,
    norm_quotient,
    norm_sums,
    row_cosine_of,
    row_cosine_sums,
    sum_dtype,
    value_dtype,
)

# The reference is annotated "..." and not " *shape": a shape that differs from the synthetic
# gradient's is refused by `check_shapes`, whose message says more than a type checker's.


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
    cosine = cosine_of(*cosine_sums(synthetic, true))
    return cosine.to(value_dtype(synthetic, true))


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
    mean, zero_share = row_cosine_of(*row_cosine_sums(synthetic, true))
    dtype = value_dtype(synthetic, true)
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
    error = norm_quotient(*difference_sums(synthetic, true))
    return error.to(value_dtype(synthetic, true))


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
    ratio = norm_quotient(*norm_sums(synthetic, true))
    return ratio.to(value_dtype(synthetic, true))


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
    return share.to(value_dtype(synthetic, true))


def _gradient_sign_agreement_update(
    synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]
) -> tuple[Float[Tensor, ""], Real[Tensor, ""]]:
    """Return the number of agreeing entries, or NaN, and of entries with a non-zero reference."""
    check_shapes(synthetic, true)
    nonzero = true != 0
    agreeing = (nonzero & (synthetic.sign() == true.sign())).sum()
    # comparisons and counts drop a NaN, so it has to be put back; an integer could not hold it
    finite = synthetic.isfinite().all() & true.isfinite().all()
    return torch.where(finite, agreeing.to(sum_dtype(true)), torch.nan), nonzero.sum()


def _gradient_sign_agreement_compute(
    agreeing: Float[Tensor, ""], nonzero: Real[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the share of agreeing entries."""
    return agreeing / nonzero.clamp(min=1)
