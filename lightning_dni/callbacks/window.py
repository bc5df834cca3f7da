"""What the gradients at one boundary amount to over the micro-batches of one optimizer step."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_dni.callbacks.replicas import Replicas
from lightning_dni.core.report import BoundaryReport
from lightning_dni.metrics import (
    GradientCosineSimilarity,
    GradientNormRatio,
    GradientRelativeError,
    gradient_cosine,
    gradient_relative_error,
)

Distances = Mapping[str, Callable[[], Metric]]

ROW_COSINE = "dni_row_cosine"
TO_TRUE: Distances = {
    "dni_sg_error": GradientRelativeError,
    "dni_true_gradient_cosine": GradientCosineSimilarity,
    ROW_COSINE: partial(GradientCosineSimilarity, reduction="rows"),
    "dni_norm_ratio": GradientNormRatio,
}
TO_TARGET: Distances = {
    "dni_target_error": GradientRelativeError,
    "dni_target_cosine": GradientCosineSimilarity,
}
TARGET_TO_TRUE: Distances = {"dni_bootstrap_error": GradientRelativeError}


class BoundaryWindow:
    """Sums over micro-batches, so that `compute` gives what the joint batch would have given."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._loss = EstimatorLoss()
        self._applied: dict[str, Tensor] = {}
        self._true: dict[str, Tensor] = {}

    def update(self, report: BoundaryReport) -> None:
        """Add a micro-batch."""
        if report.target is not None:
            self._compare(TO_TARGET, report.synthetic, report.target)
        if report.true is not None:
            self._compare(TO_TRUE, report.synthetic, report.true)
            if report.target is not None:
                self._compare(TARGET_TO_TRUE, report.target, report.true)
        if report.loss is not None:
            self._loss.update(report.loss, report.synthetic, report.target if report.regresses else None)
        _add(self._applied, report.applied_weights)
        _add(self._true, report.true_weights)

    def compute(self, replicas: Replicas | None = None) -> dict[str, Tensor]:
        """The metrics by name, without those for which nothing was measured.

        Args:
            replicas: The processes whose rows count together; None: there are no others.
        """
        values = {name: metric.compute() for name, metric in self._metrics.items()}
        if ROW_COSINE in self._metrics:
            values["dni_zero_rows"] = _zero_share(self._metrics[ROW_COSINE])
        loss = self._loss.compute(replicas)
        if loss is not None:
            values["dni_sg_loss"] = loss
        if self._true:
            sides = self._applied, self._true
            applied, true = _side_by_side(*(sides if replicas is None else map(replicas.totals, sides)))
            values["dni_weight_cosine"] = gradient_cosine(applied, true)
            values["dni_weight_error"] = gradient_relative_error(applied, true)
        return values

    def _compare(self, distances: Distances, gradient: Tensor, reference: Tensor) -> None:
        for name, make in distances.items():
            if name not in self._metrics:
                self._metrics[name] = _place(make(), gradient.device)
            self._metrics[name].update(gradient, reference)


class EstimatorLoss:
    """An estimator's loss, averaged over rows, over the variance of its target where it has one."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._rows = 0
        self._spread: Spread | None = None

    def update(
        self,
        loss: Float[Tensor, ""],
        synthetic: Float[Tensor, " rows features"],
        target: Float[Tensor, " rows features"] | None,
    ) -> None:
        """Add the `loss` of a micro-batch; `target` only where the loss is a distance to it."""
        rows = len(synthetic)
        weighted = loss.to(_sum_dtype(loss)) * rows
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._rows += rows
        if target is not None:
            self._spread = self._spread or Spread()
            self._spread.update(target)

    def compute(self, replicas: Replicas | None = None) -> Float[Tensor, ""] | None:
        """The loss; over a variance of zero it is 0 if it is zero itself, else infinite."""
        if self._sum is None:
            return None
        loss = _mean(self._sum, self._rows, replicas)
        if self._spread is None:
            return loss.float()
        return torch.where(loss == 0, 0.0, loss / self._spread.variance(replicas)).float()


class Spread:
    """Variance of rows around their mean, pooled over batches without cancellation (Chan et al. 1979)."""

    def __init__(self) -> None:
        self._rows = 0
        self._all_rows = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, values: Float[Tensor, " rows features"]) -> None:
        """Add rows. Those of another length (a longer sequence) are taken around a mean of their own."""
        rows, values = len(values), values.to(_sum_dtype(values))
        mean = values.mean(0)
        squares = (values - mean).square().sum()
        if self._mean is None or self._mean.shape != mean.shape:
            self._rows, self._mean = rows, mean
        else:
            total = self._rows + rows
            shift = mean - self._mean
            squares = squares + shift.square().sum() * (self._rows * rows / total)
            self._mean = self._mean + shift * (rows / total)
            self._rows = total
        self._all_rows += rows
        self._squares = squares if self._squares is None else self._squares + squares

    def variance(self, replicas: Replicas | None = None) -> Float[Tensor, ""]:
        """Mean squared distance of a row to the mean."""
        assert self._squares is not None
        assert self._mean is not None
        squares = self._squares
        if replicas is not None and _are_equal(self._mean.numel(), replicas, self._mean):
            shift = self._mean - _mean(self._mean * self._rows, self._rows, replicas)
            squares = squares + shift.square().sum() * self._rows
        return _mean(squares, self._all_rows, replicas)


def _mean(total: Tensor, rows: int, replicas: Replicas | None) -> Tensor:
    """The `total` over `rows`, of all processes."""
    if replicas is None:
        return total / rows
    return replicas.total(total) / replicas.total(total.new_tensor(float(rows)))


def _are_equal(size: int, replicas: Replicas, like: Tensor) -> bool:
    """Whether every process has this `size` (no variance among them)."""
    count, total, squares = replicas.total(like.new_tensor([1.0, size, size**2])).tolist()
    return bool(count * squares == total**2)


def _zero_share(metric: Metric) -> Tensor:
    with metric.sync_context():
        rows, zero_rows = metric.rows, metric.zero_rows
        assert isinstance(rows, Tensor)
        assert isinstance(zero_rows, Tensor)
        return zero_rows / rows.clamp(min=1)


def _place(metric: Metric, device: torch.device) -> Metric:
    if device.type == "mps":
        metric.set_dtype(torch.float32)
    return metric.to(device)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _add(sums: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        sums[name] = sums[name] + gradient if name in sums else gradient


def _side_by_side(applied: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both as one vector over the same weights; a weight that got no gradient counts as zero."""
    pairs = [(applied.get(name), true.get(name)) for name in {**applied, **true}]
    sides = [
        (
            torch.zeros_like(t) if a is None and t is not None else a,
            torch.zeros_like(a) if t is None and a is not None else t,
        )
        for a, t in pairs
    ]
    left, right = ([g.flatten() for g in side if g is not None] for side in zip(*sides, strict=True))
    return torch.cat(left), torch.cat(right)
