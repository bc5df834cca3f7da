"""The metrics of one boundary, from the sums over one optimizer step."""

import torch
from torch import Tensor

from lightning_dni.callbacks.replicas import Replicas
from lightning_dni.core.distance import cosine_of, norm_quotient, row_cosine_of
from lightning_dni.core.figures import Figures
from lightning_dni.core.report import BoundaryReport
from lightning_dni.core.sums import BoundarySums


class BoundaryWindow:
    """Sums over micro-batches, so that `compute` gives what the joint batch would have given."""

    def __init__(self) -> None:
        self._sums = BoundarySums()

    def update(self, report: BoundaryReport) -> None:
        """Add a micro-batch."""
        self._sums.update(report)

    def figures(self, replicas: Replicas | None = None) -> Figures:
        """The sums.

        Args:
            replicas: The processes whose rows count together; None: there are no others.
        """
        return self._sums.figures(together=replicas)

    def compute(self, replicas: Replicas | None = None) -> dict[str, Tensor]:
        """The metrics by name, without those for which nothing was measured."""
        return metrics_of(self.figures(replicas))


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
    if "input" in sums:
        values["dni_input_error"] = norm_quotient(*sums["input"])
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
