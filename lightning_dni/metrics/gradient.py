"""The gradient distances as torchmetrics that accumulate over batches and processes."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_dni.core.distance import (
    cosine_of,
    cosine_sums,
    difference_sums,
    norm_quotient,
    norm_sums,
    row_cosine_of,
    row_cosine_sums,
    value_dtype,
)
from lightning_dni.metrics.functional import _gradient_sign_agreement_compute, _gradient_sign_agreement_update

_REDUCTIONS = ("flatten", "rows")


class _GradientMetric(Metric):
    """Sums over batches and processes; what is summed is the subclass's affair.

    Sums are float64 from the start, so that they neither drift over a long run nor lose a vanishing
    gradient, and so that processes agree on the dtype even if one of them has seen no batch. Only
    `set_dtype` changes it: `set_dtype(torch.float32)` is needed before a move to MPS, which has no
    float64. Values come in the dtype that the function gives for the last batch.
    """

    full_state_update = False

    def __init__(self, sums: tuple[str, ...], counts: tuple[str, ...], **kwargs: object) -> None:
        super().__init__(**kwargs)
        for name in sums:
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in counts:
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self._last_dtype = torch.float32

    def _add(self, synthetic: Tensor, true: Tensor, **statistics: Tensor) -> None:
        self._last_dtype = value_dtype(synthetic, true)
        for name, statistic in statistics.items():
            state = getattr(self, name)
            # not in place: a state reset under inference mode could not be changed outside of it
            setattr(self, name, state + statistic.to(state.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> torch.nn.Module:
        """Move the states, keep their dtype: `module.to(torch.bfloat16)` would round the sums."""
        if self._dtype_convert:  # torchmetrics' mark of a call to `set_dtype`
            return super()._apply(fn, exclude_state)

        def move(tensor: Tensor) -> Tensor:
            """Move a state, but leave its precision."""
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


class GradientCosineSimilarity(_GradientMetric):
    """Cosine of synthetic and true gradient, over everything seen so far.

    As input to `update` the metric accepts `synthetic` and `true`, two gradients of the same shape.
    As output `compute` returns a 0-d tensor in [-1, 1], equal to the function of the concatenated
    batches, with the function's conventions for zero gradients and NaN.

    Attributes:
        rows: Number of rows seen; with `reduction="flatten"` every batch is one row.
        zero_rows: Number of those whose true gradient is zero. Like every state it counts this
            process alone, except inside `with metric.sync_context():`.

    Args:
        reduction: `"flatten"` for `gradient_cosine` of whole tensors, `"rows"` for the mean that
            `gradient_row_cosine` takes over the rows whose true gradient is non-zero.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If `reduction` is neither.

    Example:
        >>> metric = GradientCosineSimilarity(reduction="rows")
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        >>> metric.compute(), metric.zero_rows
        (tensor(0.6000), tensor(1))
    """

    is_differentiable = True
    higher_is_better = True

    cosine_sum: Tensor
    dot: Tensor
    synthetic_square: Tensor
    true_square: Tensor
    rows: Tensor
    zero_rows: Tensor

    def __init__(self, reduction: str = "flatten", **kwargs: object) -> None:
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"Expected argument `reduction` to be one of {_REDUCTIONS}, but got {reduction!r}."
            )
        flat = ("dot", "synthetic_square", "true_square")
        sums = ("cosine_sum",) if reduction == "rows" else flat
        super().__init__(sums, ("rows", "zero_rows"), **kwargs)
        self.reduction = reduction

    def update(self, synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> None:
        """Add a batch of gradients."""
        if self.reduction == "rows":
            cosine_sum, rows, zero_rows = row_cosine_sums(synthetic, true)
            self._add(synthetic, true, cosine_sum=cosine_sum, rows=rows, zero_rows=zero_rows)
            return
        dot, synthetic_square, true_square = cosine_sums(synthetic, true)
        zero = true_square == 0
        self._add(
            synthetic,
            true,
            dot=dot,
            synthetic_square=synthetic_square,
            true_square=true_square,
            rows=torch.ones_like(zero),
            zero_rows=zero,
        )

    def compute(self) -> Float[Tensor, ""]:
        """Return the cosine of everything seen since the last reset."""
        if self.reduction == "rows":
            cosine, _ = row_cosine_of(self.cosine_sum, self.rows, self.zero_rows)
        else:
            cosine = cosine_of(self.dot, self.synthetic_square, self.true_square)
        return cosine.to(self._last_dtype)


class GradientRelativeError(_GradientMetric):
    """Norm of synthetic minus true gradient over the norm of the true one, of everything seen.

    As input to `update` the metric accepts `synthetic` and `true`, two gradients of the same shape.
    As output `compute` returns a 0-d tensor in [0, inf], equal to `gradient_relative_error` of the
    concatenated batches, with its conventions for zero gradients and NaN.

    Attributes:
        zero_gradients: Number of batches whose true gradient is zero. Like every state it counts
            this process alone, except inside `with metric.sync_context():`.

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = GradientRelativeError()
        >>> metric.update(torch.tensor([3.0]), torch.tensor([3.0]))
        >>> metric.update(torch.tensor([1.0]), torch.tensor([4.0]))
        >>> metric.compute()
        tensor(0.6000)
    """

    is_differentiable = True
    higher_is_better = False

    difference_square: Tensor
    true_square: Tensor
    zero_gradients: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(("difference_square", "true_square"), ("zero_gradients",), **kwargs)

    def update(self, synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> None:
        """Add a batch of gradients."""
        difference, reference = difference_sums(synthetic, true)
        self._add(
            synthetic,
            true,
            difference_square=difference,
            true_square=reference,
            zero_gradients=reference == 0,
        )

    def compute(self) -> Float[Tensor, ""]:
        """Return the error of everything seen since the last reset."""
        error = norm_quotient(self.difference_square, self.true_square)
        return error.to(self._last_dtype)


class GradientNormRatio(_GradientMetric):
    """Norm of the synthetic gradient over the norm of the true one, of everything seen so far.

    As input to `update` the metric accepts `synthetic` and `true`, two gradients of the same shape.
    As output `compute` returns a 0-d tensor in [0, inf], equal to `gradient_norm_ratio` of the
    concatenated batches, with its conventions for zero gradients and NaN. The best value is 1, so
    `higher_is_better` is None.

    Attributes:
        zero_gradients: Number of batches whose true gradient is zero. Like every state it counts
            this process alone, except inside `with metric.sync_context():`.

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = GradientNormRatio()
        >>> metric.update(torch.tensor([3.0]), torch.tensor([0.0]))
        >>> metric.update(torch.tensor([4.0]), torch.tensor([2.0]))
        >>> metric.compute(), metric.zero_gradients
        (tensor(2.5000), tensor(1))
    """

    is_differentiable = True
    higher_is_better = None

    synthetic_square: Tensor
    true_square: Tensor
    zero_gradients: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(("synthetic_square", "true_square"), ("zero_gradients",), **kwargs)

    def update(self, synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> None:
        """Add a batch of gradients."""
        numerator, reference = norm_sums(synthetic, true)
        self._add(
            synthetic,
            true,
            synthetic_square=numerator,
            true_square=reference,
            zero_gradients=reference == 0,
        )

    def compute(self) -> Float[Tensor, ""]:
        """Return the ratio of everything seen since the last reset."""
        ratio = norm_quotient(self.synthetic_square, self.true_square)
        return ratio.to(self._last_dtype)


class GradientSignAgreement(_GradientMetric):
    """Share of entries with the sign of the true gradient, where that is non-zero.

    As input to `update` the metric accepts `synthetic` and `true`, two gradients of the same shape.
    As output `compute` returns a 0-d tensor in [0, 1], equal to `gradient_sign_agreement` of the
    concatenated batches, with its conventions for zero gradients and NaN.

    Attributes:
        zero_gradients: Number of batches whose true gradient is zero. Like every state it counts
            this process alone, except inside `with metric.sync_context():`.

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = GradientSignAgreement()
        >>> metric.update(torch.tensor([0.1, -9.0]), torch.tensor([1.0, -1.0]))
        >>> metric.update(torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 5.0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True

    agreeing: Tensor
    nonzero: Tensor
    zero_gradients: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(("agreeing",), ("nonzero", "zero_gradients"), **kwargs)

    def update(self, synthetic: Float[Tensor, " *shape"], true: Float[Tensor, "..."]) -> None:
        """Add a batch of gradients."""
        agreeing, nonzero = _gradient_sign_agreement_update(synthetic, true)
        self._add(synthetic, true, agreeing=agreeing, nonzero=nonzero, zero_gradients=nonzero == 0)

    def compute(self) -> Float[Tensor, ""]:
        """Return the share among everything seen since the last reset."""
        return _gradient_sign_agreement_compute(self.agreeing, self.nonzero).to(self._last_dtype)
