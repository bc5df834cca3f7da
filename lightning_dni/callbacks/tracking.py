"""TrackingConditionMonitor: log whether the condition of Proposition 2 held, step by step."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dni.analysis.tracking import TrackingInstrument, tracking_condition
from lightning_dni.callbacks._compat import rank_zero_info
from lightning_dni.callbacks.engine import key_of
from lightning_dni.callbacks.instrument import InstrumentMonitor
from lightning_dni.callbacks.replicas import Replicas
from lightning_dni.core.report import BoundaryReport


class TrackingConditionMonitor(InstrumentMonitor):
    """Measures a surrogate of Proposition 2's condition (Czarnecki et al. 2017, section 4) every n-th step.

    Keys, at every boundary with weights below it: `dni_tracking_epsilon/<boundary>`, norm of the error of the
    gradient that was applied; `dni_tracking_norm`, K, the largest singular value of the derivative of the
    activation in the weights of the stage below; `dni_tracking_fraction`, epsilon K over the norm of the true
    gradient of these weights; `dni_tracking_delta`, the largest delta with which the condition holds, not
    positive where none does; and `dni_tracking_held`, 1 or 0.

    The condition is sufficient, not necessary. Where it fails no guarantee holds; training may well go on to
    converge. It changes no number of the run and costs some dozens of passes down each stage on a measured
    step. Where a batch is accumulated, or spread over processes, K is the root of the sum of its parts'
    squares, which is an upper bound, so the fraction is, too.

    Args:
        every_n_train_steps: Optimizer steps from one measured step to the next.
        iterations: Of the power iteration for K, at most.
        tolerance: It stops when an iteration changes K by less than this share.

    Attributes:
        counts: At how many measured steps the condition held, and of how many, by boundary.

    Raises:
        ValueError: `every_n_train_steps` is not a positive integer.
        MisconfigurationException: When training starts in a pipeline, or without an engine.
    """

    def __init__(self, every_n_train_steps: int = 50, iterations: int = 100, tolerance: float = 1e-4) -> None:
        super().__init__(every_n_train_steps, TrackingInstrument(iterations, tolerance))
        self.counts: dict[str, tuple[int, int]] = {}
        self._windows: dict[str, _Window] = {}

    @override
    def _observe(self, boundary: str, facts: BoundaryReport, measured: Mapping[str, Tensor]) -> None:
        self._windows.setdefault(boundary, _Window()).update(measured, facts.true_weights)

    @override
    def _row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Mapping[str, Tensor]:
        replicas = Replicas(trainer.strategy, pl_module) if trainer.world_size > 1 else None
        row: dict[str, Tensor] = {}
        for name, window in self._windows.items():
            measured, weights = window.total(replicas, trainer.world_size)
            if not measured["jacobian_square"]:  # no weights below, so nothing that could go wrong
                continue
            condition = tracking_condition(measured, weights)
            values = {
                "dni_tracking_epsilon": condition.epsilon,
                "dni_tracking_norm": condition.jacobian_norm,
                "dni_tracking_fraction": condition.fraction,
                "dni_tracking_delta": condition.delta,
                "dni_tracking_held": condition.held,
            }
            row |= {key_of(metric, name): value.float() for metric, value in values.items()}
            held, of = self.counts.get(name, (0, 0))
            self.counts[name] = (held + int(condition.held), of + 1)
        self._windows = {}
        return row

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how often the condition held."""
        super().on_train_end(trainer, pl_module)
        if self.counts:
            counts = self.counts.items()
            said = ", ".join(f"{held} of {of} measured steps at {name!r}" for name, (held, of) in counts)
            rank_zero_info(
                f"TrackingConditionMonitor: the condition of Proposition 2 held at {said}. It is "
                "sufficient, not necessary: where it fails no guarantee holds, which does not say that "
                "training fails."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """How often the condition held so far."""
        return {"counts": {name: list(counts) for name, counts in self.counts.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.counts = {name: (held, of) for name, (held, of) in state_dict["counts"].items()}


class _Window:
    """What the micro-batches of one step have shown at one boundary."""

    def __init__(self) -> None:
        self._measured: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def update(self, measured: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Add a micro-batch."""
        squares = {name: value for name, value in measured.items() if name != "scale"}
        self._measured = {n: self._measured.get(n, torch.zeros_like(v)) + v for n, v in squares.items()}
        self._measured["scale"] = measured["scale"]
        for name, gradient in weights.items():
            self._weights[name] = self._weights[name] + gradient if name in self._weights else gradient

    def total(
        self, replicas: Replicas | None, processes: int
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Figures and weights' gradients, of all processes if there are others."""
        if replicas is None:
            return self._measured, self._weights
        squares = {n: replicas.total(v) for n, v in self._measured.items() if n != "scale"}
        scale = self._measured["scale"] * processes  # the joint loss is the mean of theirs
        return {**squares, "scale": scale}, replicas.totals(self._weights)
