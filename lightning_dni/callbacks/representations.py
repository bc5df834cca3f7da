"""RepresentationMonitor: what each layer makes of samples, drawn during or after training."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_dni.analysis import (
    class_block_distances,
    dissimilarity,
    fit_probe,
    layer_outputs,
    order_by_class,
    weight_norm_profile,
    weight_norm_slope,
)
from lightning_dni.callbacks._compat import MisconfigurationException, rank_zero_info, rank_zero_warn
from lightning_dni.callbacks.layers import layers_before, resolve_layers
from lightning_dni.callbacks.pictures import picture_path, write_figure
from lightning_dni.callbacks.representation_report import (
    COLUMNS,
    Representations,
    draw_dissimilarities,
    draw_representations,
)
from lightning_dni.callbacks.samples import Samples
from lightning_dni.callbacks.wandb_report import WandbReport
from lightning_dni.core.report import HasEngine
from lightning_dni.pipeline.staged import StagedEngine

PICTURE, STRIP, TABLE = "dni_representations", "dni_dissimilarities", "dni_layers"


class RepresentationMonitor(pl.Callback):
    """Measures how classes are laid out in every layer (Czarnecki et al. 2017, section 5), by one process.

    For each layer: the dissimilarity matrix of samples in the order of their classes, how far its
    within-class blocks are from the last layer's, the accuracy of a linear probe, and the squared norm of
    the weights, with the slope of these over the layers (`dni_norm_slope`) and its sign. W&B gets a picture,
    `dni_representations`, and a table, `dni_layers`; other loggers get the numbers,
    `dni_layer_<curve>/<layer>`, and their directory two pictures per measurement,
    `dni_representations_step_<n>.png` and, with the matrices alone, `dni_dissimilarities_step_<n>.png`.
    Layers behind which the network is cut are marked in red. It works under every strategy whose processes
    hold the whole model, with synthetic gradients or without, and changes no number of the run.

    Args:
        layers: Names or fnmatch patterns of submodules, a wildcard for one level. None: the boundaries, with
            what has parameters beside them; without a boundary, the parts of the first submodule in which
            several parts have parameters.
        samples: Inputs, as the module's `forward` takes them, and labels. None: the first rows that
            validation reads (in several processes, those of the first one).
        num_samples: How many of them go into the matrices.
        num_probed: How many of them are for the linear probes, which are fitted to every second one and
            tested on the others; 0 for no probes.
        penalty: Of the probes (`fit_probe`); with a small one they fit all that can be told apart.
        every_n_epochs: Epochs from one measurement to the next. None: only at the end of fit, where there is
            always one.

    Attributes:
        history: The curves so far; saved in checkpoints.
        matrices: The dissimilarity matrices of the last measurement, by layer.

    Raises:
        ValueError: A number is out of range.
        MisconfigurationException: There are no samples, or they have no classes; or, when fit starts, a layer
            is unknown, or no process holds the whole model.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        samples: tuple[Tensor, Tensor] | None = None,
        num_samples: int = 400,
        num_probed: int = 2000,
        penalty: float = 1e-3,
        every_n_epochs: int | None = None,
    ) -> None:
        _check_integer("num_samples", num_samples, 2)
        _check_integer("num_probed", num_probed, 0)
        if not 0 < penalty < math.inf:
            raise ValueError(f"Expected `penalty` to be above 0 and finite, but got {penalty!r}.")
        if every_n_epochs is not None:
            _check_integer("every_n_epochs", every_n_epochs, 1)
        self._patterns = layers
        self._num_samples, self._num_probed, self._every_n = num_samples, num_probed, every_n_epochs
        self._penalty = penalty
        self._samples = Samples(max(num_samples, num_probed), samples)
        self._layers: dict[str, nn.Module] = {}
        self._cuts: tuple[str, ...] = ()
        self._wandb: WandbReport | None = None
        self.history: list[Representations] = []
        self.matrices: dict[str, Tensor] = {}

    # ---- around the fit

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers."""
        strategy = trainer.strategy
        engine = strategy.engine if isinstance(strategy, HasEngine) else None
        staged = isinstance(engine, StagedEngine)
        if staged or (trainer.world_size > 1 and not isinstance(strategy, DDPStrategy)):
            raise MisconfigurationException(
                "Expected a process that holds the whole model for RepresentationMonitor, but got "
                f"{type(strategy).__name__}, which trains it in parts. Leave the callback out, load the "
                "finished checkpoint, and call `lightning_dni.analysis.layer_outputs`."
            )
        if not (self._samples.is_given or trainer.enable_validation):
            raise MisconfigurationException(
                "Expected `samples`, or validation to take them from, but got neither. Pass "
                "RepresentationMonitor(samples=(inputs, labels)), or data to validate on."
            )
        boundaries = () if engine is None else tuple(getattr(engine, "boundaries", ()))
        self._layers = resolve_layers(pl_module, self._patterns, boundaries)
        self._cuts = layers_before(pl_module, self._layers, boundaries)
        self._wandb = WandbReport(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, every n epochs."""
        if self._every_n is not None and (trainer.current_epoch + 1) % self._every_n == 0:
            self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, unless that was just done."""
        if not self.history or self.history[-1].step != trainer.global_step:
            self._measure(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model."""
        self._layers, self._wandb = {}, None

    # ---- samples

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew if there are too few samples so far."""
        self._samples.restart()

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep samples of the first data loader."""
        if self._layers and dataloader_idx == 0 and trainer.is_global_zero:
            self._samples.see(batch)

    # ---- one measurement

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not len(self._samples):
            rank_zero_warn(
                "RepresentationMonitor has measured nothing: no validation has run yet. Validate earlier, or "
                "pass `samples`."
            )
            return
        inputs, labels = self._samples.joint()
        rows = layer_outputs(pl_module, self._layers, inputs.to(pl_module.device), forward=_as(trainer))
        drawn = order_by_class(labels[: self._num_samples])
        self.matrices = {name: dissimilarity(found[drawn]) for name, found in rows.items()}
        distances = class_block_distances(list(self.matrices.values()), labels[drawn]).tolist()
        probed = labels[: self._num_probed]
        accuracies = {
            name: _probe(found[: len(probed)], probed, self._penalty) for name, found in rows.items()
        }
        measured = {name: pair for name, pair in accuracies.items() if pair is not None}
        found = Representations(
            step=trainer.global_step,
            distance=dict(zip(rows, distances, strict=True)),
            train_accuracy={name: train for name, (train, _) in measured.items()},
            test_accuracy={name: test for name, (_, test) in measured.items()},
            weight_norm=weight_norm_profile(self._layers),
            norm_slope=weight_norm_slope(self._layers),
        )
        self.history.append(found)
        self._show(trainer, found)

    def _show(self, trainer: pl.Trainer, found: Representations) -> None:
        assert self._wandb is not None
        figure = draw_representations(found, self.matrices, self._cuts)
        step = trainer.global_step - 1
        row = found.as_metrics()
        for logger in trainer.loggers:
            if not isinstance(logger, WandbLogger):  # which gets a table
                logger.log_metrics(row, step)
        self._wandb.show_figure(PICTURE, figure, "dissimilarity matrices and curves over layers", step)
        self._wandb.show_table(TABLE, COLUMNS, found.rows(self._cuts), step)
        path = picture_path(trainer, f"{PICTURE}_step_{found.step}.png")
        if path is not None:
            write_figure(figure, path)
            strip = draw_dissimilarities(self.matrices, self._cuts)
            write_figure(strip, path.with_name(f"{STRIP}_step_{found.step}.png"))
            rank_zero_info(f"RepresentationMonitor has drawn what the layers make of samples: {path}")

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"history": [found.state_dict() for found in self.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved curves."""
        self.history = [Representations(**found) for found in state_dict["history"]]


def _as(trainer: pl.Trainer) -> Any:
    """How a batch goes through the trainer's module in validation, without its step."""

    def forward(inputs: Tensor) -> None:
        plugin, module = trainer.precision_plugin, trainer.lightning_module
        with plugin.forward_context():
            module(plugin.convert_input(inputs))

    return forward


def _probe(rows: Tensor, labels: Tensor, penalty: float) -> tuple[float, float] | None:
    """Training and test accuracy of a probe; NaN for a layer that has diverged."""
    if len(labels) < 2:
        return None
    if not rows.isfinite().all():
        return math.nan, math.nan
    probe = fit_probe(rows[0::2], labels[0::2], num_classes=int(labels.max()) + 1, penalty=penalty)
    return probe.accuracy(rows[0::2], labels[0::2]), probe.accuracy(rows[1::2], labels[1::2])


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be an integer of at least {least}, but got {value!r}.")
