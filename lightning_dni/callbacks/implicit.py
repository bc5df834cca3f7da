"""ImplicitLossMonitor: log whether each estimator implements a loss at all, and draw it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dni.analysis.field import conservation_of
from lightning_dni.analysis.implicit import LossSurfaces, loss_surfaces, plane
from lightning_dni.callbacks._compat import rank_zero_info
from lightning_dni.callbacks.engine import key_of
from lightning_dni.callbacks.instrument import InstrumentMonitor
from lightning_dni.callbacks.landscape import draw_loss_surfaces
from lightning_dni.callbacks.pictures import picture_path, write_figure
from lightning_dni.callbacks.wandb_report import WandbReport
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.instrument import Observation
from lightning_dni.core.report import BoundaryReport
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator

PICTURE = "dni_implicit_loss"

WIDEST = 1024
"""Activations of a row up to which the derivative of an estimator that is not linear is taken."""


class ImplicitLossMonitor(InstrumentMonitor):
    """Measures the loss that each estimator implements (Czarnecki et al. 2017, section 5) every n-th step.

    Keys: `dni_curl/<boundary>`, norm of J - J^T over the norm of J, the derivative of the synthetic gradient
    in its activation (0: it is the gradient of a loss); `dni_smallest_eigenvalue`, the smallest of the
    symmetric part of J (negative: that loss curves down somewhere; under a linear estimator it is unbounded
    below). For a linear estimator on vectors they are exact, for any other they are of some rows of the
    batch. Boundaries that several tensors cross, and wide ones under other estimators, are left out.

    Where the network's input is two-dimensional (the batch is `[rows, 2]`, or begins with it) and estimators
    are told labels, the implicit losses are drawn over a plane of inputs, for each label, beside the true
    loss if `loss` says what that is: to W&B as `dni_implicit_loss`, else as `dni_implicit_loss_<step>.png` in
    the log directory. `dni_implicit_correlation/<boundary>` is then the correlation of the two over the
    plane, within each class, averaged over classes. Linear estimators on vectors count by their closed form,
    others by a path integral (`loss_surfaces`). The network is run on the plane in evaluation mode. No number
    of the run changes.

    Args:
        every_n_train_steps: Optimizer steps from one measured step to the next.
        loss: The true loss of each row `[rows]`, from the network's output and integer labels `[rows]`, such
            as `partial(F.cross_entropy, reduction="none")`.
        rows: How many rows of the batch are looked at.
        side: Points of the plane along each side.

    Raises:
        ValueError: `every_n_train_steps` is not a positive integer.
        MisconfigurationException: When training starts in a pipeline, or without an engine.
    """

    def __init__(
        self,
        every_n_train_steps: int = 200,
        loss: Callable[[Any, Any], Any] | None = None,
        rows: int = 16,
        side: int = 20,
    ) -> None:
        self._seen = _Conservation(rows)
        super().__init__(every_n_train_steps, self._seen)
        self._loss, self._side = loss, side
        self._row_so_far: dict[str, Tensor] = {}
        self._plane: Tensor | None = None
        self._draws = True
        self._wandb: WandbReport | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the engine and the loggers."""
        super().on_train_start(trainer, pl_module)
        self._wandb, self._draws, self._plane = WandbReport(trainer), True, None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the engine and the estimators."""
        super().teardown(trainer, pl_module, stage)
        self._wandb = None
        self._seen.estimators.clear()

    @override
    def _observe(self, boundary: str, facts: BoundaryReport, measured: Mapping[str, Tensor]) -> None:
        self._row_so_far |= {key_of(f"dni_{what}", boundary): v.float() for what, v in measured.items()}

    @override
    def _row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Mapping[str, Tensor]:
        row, self._row_so_far = self._row_so_far, {}
        surfaces = self._surfaces(pl_module, batch) if self._draws else None
        if surfaces is None:
            return row
        if surfaces.true is not None:
            found = surfaces.correlations()
            row |= {key_of("dni_implicit_correlation", n): c.mean().float() for n, c in found.items()}
        self._show(trainer, surfaces)
        return row

    def _surfaces(self, pl_module: pl.LightningModule, batch: Any) -> LossSurfaces | None:
        """The losses over the plane; None, and never again, where there is none."""
        estimators = dict(self._seen.estimators)
        classes = max((e.num_classes or 0 for e in estimators.values()), default=0)
        inputs = _inputs(batch)
        if inputs is None or not classes:
            self._stop_drawing("the input has not two dimensions, or no estimator is told labels.")
            return None
        if self._plane is None:
            self._plane = plane(*_corners(inputs), self._side)
        try:
            return loss_surfaces(pl_module, estimators, self._plane.to(inputs), classes, self._loss)
        except NotImplementedError:
            self._stop_drawing(f"{type(pl_module).__name__} has no `forward`.")
        except BoundaryError as error:
            self._stop_drawing(str(error))
        return None

    def _stop_drawing(self, why: str) -> None:
        self._draws = False
        rank_zero_info(f"ImplicitLossMonitor draws no pictures: {why} It logs curl and eigenvalues.")

    def _show(self, trainer: pl.Trainer, surfaces: LossSurfaces) -> None:
        assert self._wandb is not None
        if not trainer.is_global_zero:
            return
        figure = draw_loss_surfaces(surfaces, f"Losses implemented by the estimators, step {self._step}")
        self._wandb.show_figure(PICTURE, figure, "true and implicit losses", self._step)
        path = picture_path(trainer, f"{PICTURE}_{self._step}.png")
        if path is not None:
            write_figure(figure, path)


class _Conservation:
    """The instrument: curl and smallest eigenvalue of every estimator, which it remembers by boundary."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.estimators: dict[str, GradientEstimator] = {}

    def __call__(self, crossings: Sequence[Observation]) -> Mapping[str, Tensor]:
        """The figures of one boundary; none where it is left out."""
        first = crossings[0]
        exact = isinstance(first.estimator, LinearEstimator) and first.h[0].ndim == 2
        if len(first.h) > 1 or (first.h[0][0].numel() > WIDEST and not exact):
            return {}
        self.estimators[first.boundary] = first.estimator
        context = None if first.context is None else first.context[: self._rows]
        found = conservation_of(first.estimator, first.h[0][: self._rows], context)
        return {"curl": found.curl, "smallest_eigenvalue": found.smallest_eigenvalue}


def _corners(inputs: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Those of a plane that holds all inputs and a tenth more on each side."""
    (a, b), (c, d) = inputs.amin(0).tolist(), inputs.amax(0).tolist()
    return (a - (c - a) / 10, b - (d - b) / 10), (c + (c - a) / 10, d + (d - b) / 10)


def _inputs(batch: Any) -> Tensor | None:
    """The network's input where it is `[rows, 2]`."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    plane_like = isinstance(first, Tensor) and first.ndim == 2 and first.shape[1] == 2
    return first if plane_like and torch.is_floating_point(first) else None
