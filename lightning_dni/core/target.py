"""Pure functions of synthetic and target gradients: scale, mixture, loss."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_dni.core.boundary import choose_by_patterns
from lightning_dni.core.estimator import rows_of
from lightning_dni.errors import EstimatorError

# the callable gives float | Tensor, but jsonargparse takes no function from a recipe that is declared so
Denominator = Literal["batch", "sum", "elements"] | Callable[[Any, Any], Any]
DENOMINATORS = ("batch", "sum", "elements")


def check_denominator(choice: Denominator) -> None:
    """Refuse a `loss_denominator` that is neither a known word nor a callable.

    Raises:
        EstimatorError: It is something else.
    """
    if not callable(choice) and choice not in DENOMINATORS:
        raise EstimatorError(
            f"Expected `loss_denominator` to be one of {DENOMINATORS} or a callable of batch and h, "
            f"but got {choice!r}."
        )


def choose_lambdas(boundaries: Iterable[str], value: float | Mapping[str, float]) -> dict[str, float]:
    """Lambda of BP(lambda) by boundary, from one value or {boundary or pattern: value}.

    Raises:
        EstimatorError: A value is outside [0, 1].
        BoundaryError: No pattern matches a boundary.
    """
    chosen = choose_by_patterns(boundaries, value, "bp_lambda")
    for name, bp_lambda in chosen.items():
        if not isinstance(bp_lambda, (int, float)) or not 0.0 <= bp_lambda <= 1.0:
            raise EstimatorError(
                f"Expected `bp_lambda` to be in [0, 1], but got {bp_lambda!r} for boundary {name!r}."
            )
    return {name: float(bp_lambda) for name, bp_lambda in chosen.items()}


def denominator(
    choice: Denominator, batch: Any, h: Any, rows: int, elements_per_row: int | None
) -> float | Tensor:
    """What the user's loss was divided by, so that SG / denominator is in units of that loss.

    Args:
        choice: `"batch"` (mean over rows), `"sum"`, `"elements"` (mean over rows and over the
            elements of the network's output, as `nn.MSELoss`), or a callable of `batch` and `h`.
        batch: The user's batch.
        h: The boundary's output, as the module returned it.
        rows: Number of rows of `h`.
        elements_per_row: Elements of the network's output per row; None before any was seen, when
            one is assumed (a learned estimator is exactly zero then).
    """
    if callable(choice):
        divisor: float | Tensor = choice(batch, h)
        if not isinstance(divisor, Tensor) and not (isinstance(divisor, Real) and 0 < divisor < math.inf):
            raise EstimatorError(
                "Expected `loss_denominator` to give what the loss was divided by, a number above 0, but got "
                f"{divisor!r}. Let the callable of batch and h return a number or a tensor of one element."
            )
        return divisor
    if choice == "sum":
        return 1.0
    elements = elements_per_row or 1 if choice == "elements" else 1
    return float(max(1, rows) * elements)  # no row, no gradient: any scale will do


def other_elements(who: str, before: int | None, elements: int) -> EstimatorError:
    """An error for an output whose elements per row have changed since gradients were divided by them."""
    return EstimatorError(
        f"Expected the network's output to have {before} elements per row with loss_denominator='elements', "
        f"as before, but got {elements} (sequences of another length?): {who} had to say something before. "
        "Pass a callable that says what the loss is divided by, as in `loss_denominator=lambda batch, h: "
        "batch[1].numel()`."
    )


def mix_gradients(
    synthetic: Float[Tensor, " *shape"], target: Float[Tensor, " *shape"], bp_lambda: float
) -> Float[Tensor, " *shape"]:
    """(1 - lambda) synthetic + lambda target, exact at 0 and at 1 (Jaderberg et al. 2017, supplement A).

    >>> import torch
    >>> mix_gradients(torch.tensor([1.0]), torch.tensor([3.0]), bp_lambda=0.25)
    tensor([1.5000])
    """
    if bp_lambda == 1.0:
        return target
    if bp_lambda == 0.0:
        return synthetic
    return synthetic * (1.0 - bp_lambda) + target * bp_lambda


def sg_loss(
    synthetic: Sequence[Tensor], target: Sequence[Tensor], row_weights: Tensor | None = None
) -> Float[Tensor, ""]:
    """Squared L2 distance per row, averaged over rows (Czarnecki et al. 2017, section 2).

    Args:
        synthetic: One tensor `[batch, ...]` per leaf.
        target: The same shapes; no gradient flows into it.
        row_weights: Weight of each row, `[batch]`; None counts every row once.

    >>> import torch
    >>> sg_loss([torch.tensor([[1.0, 2.0], [0.0, 0.0]])], [torch.zeros(2, 2)])
    tensor(2.5000)
    """
    rows = rows_of(synthetic)
    if row_weights is None:
        sums = [F.mse_loss(s, t, reduction="sum") for s, t in zip(synthetic, target, strict=True)]
    else:
        sums = [
            ((s - t).square().flatten(1).sum(1) * row_weights).sum()
            for s, t in zip(synthetic, target, strict=True)
        ]
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return total / max(1, rows)


def sg_loss_gradient(
    synthetic: Sequence[Tensor], arrived: Sequence[Tensor], unit: float
) -> tuple[list[Tensor], float]:
    """Derivative of `sg_loss` with respect to each synthetic gradient, as a difference and its factor.

    Args:
        synthetic: One tensor `[batch, ...]` per leaf.
        arrived: What came back, of the same shapes, in units of the user's loss.
        unit: What turns `arrived` into the target.
    """
    difference = [torch.sub(s, t, alpha=unit) for s, t in zip(synthetic, arrived, strict=True)]
    return difference, 2.0 / max(1, rows_of(synthetic))
