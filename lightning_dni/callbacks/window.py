"""The metrics of one boundary, from the sums over one optimizer step."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dni.core.distance import cosine_of, norm_quotient, row_cosine_of
from lightning_dni.core.figures import Figures
from lightning_dni.core.report import BoundaryReport
from lightning_dni.core.sums import BoundarySums

REPLICATED = ("target", "true", "bootstrap")
"""Sums that are added up over replicas, each of which has rows of its own."""


class BoundaryWindow:
    """Sums over micro-batches, so that `compute` gives what the joint batch would have given."""

    def __init__(self) -> None:
        self._sums = BoundarySums()

    def update(self, report: BoundaryReport) -> None:
        """Add a micro-batch."""
        self._sums.update(report)

    def figures(self, add_up: Callable[[Tensor], Tensor]) -> Figures:
        """The sums, of all replicas where there are any.

        Args:
            add_up: Gives the sum of a tensor over the replicas.
        """
        figures = self._sums.figures()
        shared = [name for name in REPLICATED if name in figures.sums]
        return figures.with_sums({name: add_up(figures.sums[name]) for name in shared})

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, without those for which nothing was measured."""
        return metrics_of(self._sums.figures())


def metrics_of(figures: Figures) -> dict[str, Tensor]:
    """The metrics by name, without those for which nothing was measured."""
    values: dict[str, Tensor] = {}
    sums = figures.sums
    if "target" in sums:
        dot, synthetic, target, difference = sums["target"]
        values["dni_target_error"] = norm_quotient(difference, target)
        values["dni_target_cosine"] = cosine_of(dot, synthetic, target)
    if "true" in sums:
        values |= _against_true(sums["true"])
    if "bootstrap" in sums:
        values["dni_bootstrap_error"] = norm_quotient(*sums["bootstrap"])
    if "weights" in sums:
        dot, applied, true, difference = sums["weights"]
        values["dni_weight_cosine"] = cosine_of(dot, applied, true)
        values["dni_weight_error"] = norm_quotient(difference, true)
    if "loss" in sums:
        values["dni_sg_loss"] = _loss(sums["loss"], sums.get("spread"))
    return {name: value.to(figures.dtype) for name, value in values.items()}


def _against_true(sums: Tensor) -> dict[str, Tensor]:
    dot, synthetic, true, difference, cosines, rows, zero_rows = sums
    cosine, zero_share = row_cosine_of(cosines, rows, zero_rows)
    return {
        "dni_sg_error": norm_quotient(difference, true),
        "dni_true_gradient_cosine": cosine_of(dot, synthetic, true),
        "dni_row_cosine": cosine,
        "dni_norm_ratio": norm_quotient(synthetic, true),
        "dni_zero_rows": zero_share,
    }


def _loss(sums: Tensor, spread: Tensor | None) -> Tensor:
    """The loss per row, over the variance of its target where it has one.

    Over a variance of zero it is 0 if it is zero itself, else infinite.
    """
    loss = sums[0] / sums[1]
    if spread is None:
        return loss
    return torch.where(loss == 0, 0.0, loss / (spread[0] / spread[1]))
