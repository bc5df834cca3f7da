"""An estimator as what it is to the stage below: a field of gradients over the activations of a row."""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_dni.analysis.linear import LinearMap
from lightning_dni.core import GradientEstimator
from lightning_dni.core.distance import norm_quotient
from lightning_dni.core.randomness import seeded
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator
from lightning_dni.estimators.normalization import BatchNorm
from lightning_dni.estimators.similarity import SimilarityMatching

STEP = 1e-5
"""Of central differences, times one plus the largest activation."""

AT_A_TIME = 8192
"""Rows that are evaluated together."""


class GradientField:
    """SG(h, c) of an estimator as a function of h, row by row: a frozen copy in double precision, on the CPU.

    Batch norm inside it uses its running averages, so that no row depends on another.
    Nothing of the estimator moves, and the global generator is left alone.

    Args:
        estimator: What is copied; one tensor crosses its boundary.

    Raises:
        EstimatorError: It compares the rows of a batch with each other.
    """

    def __init__(self, estimator: GradientEstimator) -> None:
        if any(isinstance(module, SimilarityMatching) for module in estimator.modules()):
            raise EstimatorError(
                f"Expected an estimator whose gradient of a row depends on that row alone, but "
                f"{type(estimator).__name__} with `similarity` compares the rows of a batch, so a row has no "
                "loss of its own. Leave `similarity` out."
            )
        self._estimator = copy.deepcopy(estimator).cpu().double().requires_grad_(False)
        for module in self._estimator.modules():
            if isinstance(module, BatchNorm):
                module.frozen = True

    @torch.no_grad()
    def __call__(
        self, h: Float[Tensor, " rows *features"], context: Tensor | None = None
    ) -> Float[Tensor, " rows *features"]:
        """The synthetic gradient at `h`, in double precision.

        Args:
            h: Activations.
            context: What the estimator is told about each row.

        Raises:
            EstimatorError: The estimator asks for a context, or gives more than one tensor.
        """
        if context is None and (self._estimator.num_classes or self._estimator.context_size):
            raise EstimatorError(
                f"Expected `context` for {type(self._estimator).__name__}, which asks for labels, but got "
                "None. Pass one for each row."
            )
        at, told = h.detach().cpu().double(), None if context is None else context.detach().cpu()
        with seeded(0, at.device):
            gradient, _ = self._estimator.synthesize((at,), told, None)
        if gradient is None:
            return torch.zeros_like(at)
        if len(gradient) != 1:
            raise EstimatorError(
                f"Expected one tensor at the boundary, but {type(self._estimator).__name__} gives "
                f"{len(gradient)}. Choose a boundary at which one crosses."
            )
        return gradient[0]

    def jacobian(
        self, h: Float[Tensor, " rows *features"], context: Tensor | None = None
    ) -> Float[Tensor, "rows flat flat"]:
        """The derivative of each row's gradient in its own activation, by central differences.

        They need no graph, so they serve estimators that take derivatives themselves, too.

        Args:
            h: Activations.
            context: What the estimator is told about each row.
        """
        at = h.detach().cpu().double()
        rows, size = len(at), at[0].numel()
        step = STEP * (1 + float(at.abs().max()))
        columns = []
        for places in torch.split_with_sizes(
            torch.arange(size), _parts(size, max(1, AT_A_TIME // (2 * rows)))
        ):
            moves = F.one_hot(places, size).double().view(-1, 1, *at.shape[1:]) * step
            moved = torch.cat([at + moves, at - moves]).flatten(0, 1)
            told = None if context is None else context.repeat(2 * len(places), *[1] * (context.ndim - 1))
            ahead, behind = self(moved, told).view(2, len(places), rows, size)
            columns.append((ahead - behind) / (2 * step))
        return torch.cat(columns).permute(1, 2, 0)


def _parts(size: int, most: int) -> list[int]:
    """Sizes of at most `most` that add up to `size`."""
    return [min(most, size - begin) for begin in range(0, size, most)]


class Conservation(NamedTuple):
    """Whether a field is the gradient of anything, and of something that is bounded below (section 5).

    Attributes:
        curl: Norm of J - J^T over the norm of J, over all rows: 0 for the gradient of a loss, 2 at most.
        smallest_eigenvalue: The smallest of the symmetric part of J in any row. Where it is negative the
            implicit loss falls without bound along a direction, if J is the same everywhere.
    """

    curl: Tensor
    smallest_eigenvalue: Tensor


def conservation(jacobian: Float[Tensor, "rows flat flat"]) -> Conservation:
    """Curl and smallest eigenvalue from the derivative of a field at some rows.

    Example:
        >>> turn = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
        >>> [float(value) for value in conservation(turn)]
        [2.0, 0.0]
    """
    transposed = jacobian.transpose(1, 2)
    curl = norm_quotient((jacobian - transposed).square().sum(), jacobian.square().sum())
    return Conservation(curl, torch.linalg.eigvalsh((jacobian + transposed) / 2).amin())


def conservation_of(
    estimator: GradientEstimator, h: Float[Tensor, " rows *features"], context: Tensor | None = None
) -> Conservation:
    """Curl and smallest eigenvalue of what `estimator` implements, at `h`.

    In closed form for `LinearEstimator`, whose derivative is A^T wherever one looks.

    Args:
        estimator: The estimator; it is left as it is.
        h: Activations at which to look.
        context: What the estimator is told about each row.
    """
    if isinstance(estimator, LinearEstimator) and h.ndim == 2:
        return conservation(LinearMap.of(estimator).A.cpu().double().t().unsqueeze(0))
    return conservation(GradientField(estimator).jacobian(h, context))
