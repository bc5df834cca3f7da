"""Sums over the gradients at one boundary, micro-batch by micro-batch."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_dni.core.distance import cosine_sums, difference_sums, row_cosine_sums, sum_dtype, value_dtype
from lightning_dni.core.figures import FAMILIES, Figures
from lightning_dni.core.report import BoundaryReport


@runtime_checkable
class Together(Protocol):
    """Processes whose rows count together; all of them have to ask for the same sums."""

    def total(self, value: Tensor) -> Tensor:
        """The sum of every process's `value`."""

    def totals(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of every process's gradient by parameter, of which each may lack some."""


class BoundarySums:
    """Sums over the micro-batches of one step, equal to those of the joint batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._spread: Spread | None = None
        self._rows = 0
        self._applied: dict[str, Tensor] = {}
        self._true: dict[str, Tensor] = {}
        self._dtype, self._device = torch.float32, torch.device("cpu")

    def update(self, report: BoundaryReport) -> None:
        """Add a micro-batch."""
        synthetic, target, true = report.synthetic, report.target, report.true
        self._dtype, self._device = value_dtype(synthetic, synthetic), synthetic.device
        self._rows += len(synthetic)
        if target is not None:
            self._add("target", _compare(synthetic, target))
        if true is not None:
            self._add(
                "true", torch.cat([_compare(synthetic, true), _vector(row_cosine_sums(synthetic, true))])
            )
            if target is not None:
                self._add("bootstrap", _vector(difference_sums(target, true)))
        if report.loss is not None:
            self.update_loss(report.loss, len(synthetic), target if report.regresses else None)
        if report.input_error is not None:
            self._add("input", report.input_error)
        _add_by_name(self._applied, report.applied_weights)
        _add_by_name(self._true, report.true_weights)

    def update_loss(
        self, loss: Float[Tensor, ""], rows: int, target: Float[Tensor, " rows features"] | None
    ) -> None:
        """Add the estimator's `loss` in a micro-batch; `target` only where the loss is a distance to it."""
        weighted = loss.to(sum_dtype(loss)) * rows
        self._add("loss", torch.stack([weighted, torch.full_like(weighted, rows)]))
        if target is not None:
            self._spread = self._spread or Spread()
            self._spread.update(target)

    def figures(self, staleness: int | None = None, together: Together | None = None) -> Figures:
        """What was summed so far; nothing where there was no row.

        Args:
            staleness: As in `Figures`.
            together: The processes whose rows count together; None: there are no others.
        """
        families, sums, rows = self._families(), dict(self._sums), self._rows
        if together is not None:
            families, rows = _in_common(families, rows, together, self._device)
        if not rows:
            return Figures({}, self._dtype, staleness)
        if together is not None:
            sums = {family: together.total(vector) for family, vector in sums.items() if family in families}
        if self._spread is not None and "spread" in families:
            sums["spread"] = self._spread.sums(together)
        if "weights" in families:
            sides = self._applied, self._true
            sums["weights"] = _compare(
                *_side_by_side(*(sides if together is None else map(together.totals, sides)))
            )
        return Figures(sums, self._dtype, staleness)

    def _families(self) -> set[str]:
        parts = {"spread": self._spread is not None, "weights": bool(self._true)}
        return {*self._sums, *(family for family, there in parts.items() if there)}

    def _add(self, family: str, sums: Tensor) -> None:
        self._sums[family] = self._sums[family] + sums if family in self._sums else sums


class Spread:
    """Squared distances of rows to their mean, pooled without cancellation (Chan et al. 1979)."""

    def __init__(self) -> None:
        self._rows = 0
        self._all_rows = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, values: Float[Tensor, " rows features"]) -> None:
        """Add rows. Those of another length (a longer sequence) are taken around a mean of their own."""
        rows, values = len(values), values.to(sum_dtype(values))
        mean = values.mean(0) if rows else values.new_zeros(values.shape[1:])
        squares = (values - mean).square().sum()
        if self._mean is None or self._mean.shape != mean.shape:
            self._rows, self._mean = rows, mean
        else:
            total = max(1, self._rows + rows)
            shift = mean - self._mean
            squares = squares + shift.square().sum() * (self._rows * rows / total)
            self._mean = self._mean + shift * (rows / total)
            self._rows += rows
        self._all_rows += rows
        self._squares = squares if self._squares is None else self._squares + squares

    def sums(self, together: Together | None = None) -> Float[Tensor, " 2"]:
        """The sum of squared distances, and the number of rows, of all processes if there are others."""
        assert self._squares is not None
        assert self._mean is not None
        squares = self._squares
        if together is not None and _are_equal(self._mean.numel(), together, self._mean):
            rows = self._mean.new_tensor(float(self._rows))
            shift = self._mean - together.total(self._mean * rows) / together.total(rows)
            squares = squares + shift.square().sum() * rows
        sums = torch.stack([squares, torch.full_like(squares, self._all_rows)])
        return sums if together is None else together.total(sums)

    def variance(self) -> Float[Tensor, ""]:
        """Mean squared distance of a row to the mean."""
        squares: Tensor = self.sums()[0]
        return squares / self._all_rows


def _in_common(
    families: set[str], rows: int, together: Together, device: torch.device
) -> tuple[set[str], int]:
    """What every process has measured: one may have skipped what another has learnt; and all their rows."""
    here = [1.0, float(rows), *(float(family in families) for family in FAMILIES)]
    processes, total, *counts = together.total(torch.tensor(here, device=device)).tolist()
    return {family for family, count in zip(FAMILIES, counts, strict=True) if count == processes}, int(total)


def _are_equal(size: int, together: Together, like: Tensor) -> bool:
    """Whether every process has this `size` (no variance among them)."""
    count, total, squares = together.total(like.new_tensor([1.0, size, size**2])).tolist()
    return bool(count * squares == total**2)


def _compare(gradient: Tensor, reference: Tensor) -> Tensor:
    dot, square, reference_square = cosine_sums(gradient, reference)
    difference, _ = difference_sums(gradient, reference)
    return torch.stack([dot, square, reference_square, difference])


def _vector(sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.to(sums[0].dtype) for each in sums])


def _add_by_name(sums: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
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
