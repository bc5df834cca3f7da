"""GradientMonitor: log how far each synthetic gradient is from the true one, and how fast training runs."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lightning_dni.callbacks._compat import forget_logged, rank_zero_info, rank_zero_warn
from lightning_dni.callbacks.configuration import describe_run
from lightning_dni.callbacks.engine import engine_of, key_of
from lightning_dni.callbacks.heatmap import FILE_NAME, Probe, write_heatmap
from lightning_dni.callbacks.performance import StepClock, peak_memory, reset_peak_memory, samples_in
from lightning_dni.callbacks.pictures import picture_path
from lightning_dni.callbacks.replicas import Replicas
from lightning_dni.callbacks.rows import check_interval, warn_of_dropped_rows
from lightning_dni.callbacks.summary import lambdas_of, summarizes, summary_of
from lightning_dni.callbacks.wandb_report import WandbReport
from lightning_dni.callbacks.window import BoundaryWindow, metrics_of
from lightning_dni.core.figures import Figures
from lightning_dni.core.report import Observable, Utilization

SUMMARIZED = 10
"""Summaries are the mean of this many last probes."""

COSINE, ERROR = "dni_true_gradient_cosine", "dni_sg_error"
TOGETHER = "(on probe steps, for which all stages of the pipeline wait: without its lag)"


class GradientMonitor(pl.Callback):
    """Measures every n-th optimizer step and logs it through `log_dict`, to every logger.

    The measured steps are those at which Lightning writes rows (the n-th, 2n-th, ...: rows n-1, 2n-1,
    ...), so `every_n_train_steps` should be a multiple of the Trainer's `log_every_n_steps`. The
    gradients of an accumulated batch are those of the joint batch. On all other steps the monitor
    reads a clock, no more. It changes no number of the run.

    Keys are `dni_<metric>/<boundary>`; `dni_mean_cosine` and `dni_worst_error` over all boundaries; and
    of the steps since the last row without the measured one, `dni_step_time` (seconds per optimizer step,
    with data loading, without validation), `dni_samples_per_second` and `dni_peak_memory` (bytes; CUDA's
    allocator, whose peak is then reset, or the whole process on a CPU). Where updates may be skipped
    (`on_nonfinite="skip"`, a gradient scaler), `dni_skipped/<boundary>` counts them. Loggers also get the
    run's configuration, W&B runs the mean of the last ten probes as summaries. At the end of fit the
    picture boundary x step goes to W&B, and as `dni_gradients.png` into the log directory of others, and a
    table says what the gradients were worth at each boundary, and what to try.

    With synthetic inputs there are no true gradients; targets are compared at the synthetic `h`, and
    `dni_input_error/<boundary>` is the norm of synthetic minus real `h` over that of the real one.

    In several processes gradients, losses and weights are those of the joint batch, and skipped updates are
    added up, the same number in every process; time, samples and memory are each process's own.

    Under `DNIPipelineStrategy` figures come up with the activations, so a row tells of an earlier step:
    the newest that has come to rank 0, `staleness` + 1 steps before it as a rule. `dni_staleness/<boundary>`
    is the age of the target gradients in it; `dni_busy/stage_<k>`, `dni_wait_in/stage_<k>` and
    `dni_wait_out/stage_<k>` are the shares of a stage's time since the last row in which it computed, waited
    for something to come, and waited to send. The rest is data loading, logging and other callbacks.

    Args:
        every_n_train_steps: Optimizer steps from one measured step to the next.
        probe: Measure true gradients, too, which costs another backward pass on those steps; else only
            what is compared with target gradients is logged, and there is no picture. None: wherever no
            process has to wait for others; in a pipeline a probe makes all stages meet once.
        recipe: Name of the recipe, for the run's configuration.
        summary: Print the table at the end of fit.

    Attributes:
        history: The probes so far; saved in checkpoints.

    Raises:
        ValueError: `every_n_train_steps` is not a positive integer.
        MisconfigurationException: When training starts under a strategy without an engine.
    """

    def __init__(
        self,
        every_n_train_steps: int = 50,
        probe: bool | None = None,
        recipe: str | None = None,
        summary: bool = True,
    ) -> None:
        self._every_n = check_interval(every_n_train_steps)
        self._probe = probe
        self._recipe = recipe
        self._summary = summary
        self.history: list[Probe] = []
        self._recent: dict[str, deque[float]] = {}
        self._engine: Observable | None = None
        self._wandb: WandbReport | None = None
        self._clock = StepClock()
        self._clear()

    def _clear(self) -> None:
        self._windows: dict[str, BoundaryWindow] = {}
        self._arrived: dict[str, Figures] = {}
        self._utilization: dict[int, Utilization] = {}
        self._spent: dict[int, Utilization] = {}
        self._memory: dict[str, float] = {}
        self._logged: tuple[str, ...] = ()
        self._described = False
        self._measured = False
        self._step, self._measured_step = 0, -1
        self._due = self._writes = False
        self._probes, self._delay = True, 0

    # ---- around the fit

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the engine and describe the run to every logger."""
        self._engine = engine_of(trainer, self, exact=True)
        self._clear()
        self._delay = self._engine.report_delay
        self._probes = self._chooses_probes(self._engine)
        self._clock.reset()
        self._wandb = WandbReport(trainer)
        warn_of_dropped_rows(trainer, self, self._every_n)
        self._describe(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the picture and print the summary."""
        self._settle_row(trainer)
        if self._described and not self._measured:
            rank_zero_warn(
                f"GradientMonitor measured nothing: fit ended at step {trainer.global_step}, and the monitor "
                f"waits for every {self._every_n}th. Pass a smaller `every_n_train_steps`."
            )
        if self.history:
            self._show(trainer)
        engine = self._engine
        if self._summary and self._measured and trainer.is_global_zero and engine and summarizes(engine):
            Console().print(summary_of(self._recent, engine))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the engine."""
        self._engine = self._wandb = None

    def _chooses_probes(self, engine: Observable) -> bool:
        if self._probe is None and "synthetic_inputs" in engine.describe():
            rank_zero_info(
                "GradientMonitor compares with target gradients only: with synthetic inputs no true gradient "
                "comes down from the loss."
            )
            return False
        if self._probe is not None or not engine.probes_synchronously:
            return self._probe is not False
        rank_zero_info(
            "GradientMonitor compares with target gradients only, since a probe of the true ones would make "
            "all stages of the pipeline wait for each other. Pass `probe=True` to have that."
        )
        return False

    def _describe(self, trainer: pl.Trainer) -> None:
        assert self._engine is not None
        configuration = describe_run(trainer, self._engine, self._recipe)
        for logger in trainer.loggers:
            logger.log_hyperparams(configuration)

    def _show(self, trainer: pl.Trainer) -> None:
        assert self._wandb is not None
        assert self._engine is not None
        note = TOGETHER if self._engine.probes_synchronously else ""
        self._wandb.show(self.history, self.history[-1].step, note)
        path = picture_path(trainer, FILE_NAME)
        if path is not None:
            write_heatmap(self.history, path, note)
            rank_zero_info(f"GradientMonitor has drawn cosine and error of the gradients: {path}")

    # ---- one step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Request a probe for every batch of a step that is to be measured."""
        self._settle_row(trainer)
        self._step = trainer.global_step
        self._writes = (self._step + 1) % self._every_n == 0
        self._due = (self._step + 1 + self._delay) % self._every_n == 0
        if not self._due:
            self._clock.run()
            return
        if self._measured_step != self._step:
            self._measured_step = self._step
            self._stop_clock(pl_module)
        assert self._engine is not None
        if self._probes:
            self._engine.request_probe()
        else:
            self._engine.request_report()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take the report of a measured batch; log at the end of its step."""
        stepped = trainer.global_step > self._step
        if self._writes if self._delay else self._due:
            self._observe()
        if not self._due:
            self._clock.count(samples_in(batch), stepped)
        if stepped and not self._described:
            # the first step builds the estimators: only now are they known, and it is timed for no row
            self._described = True
            self._describe(trainer)
            self._clock.reset()
        if stepped and self._writes and (self._windows or self._arrived or self._utilization):
            if not self._due:
                self._stop_clock(pl_module)
            self._log(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._clock.stop(pl_module.device)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock between epochs."""
        self._clock.stop(pl_module.device)

    def _stop_clock(self, pl_module: pl.LightningModule) -> None:
        self._clock.stop(pl_module.device)
        self._memory = peak_memory(pl_module.device)

    def _observe(self) -> None:
        assert self._engine is not None
        report = self._engine.last_report
        if report is None:  # no loss came out of this micro-batch
            return
        for name, facts in report.boundaries.items():
            self._windows.setdefault(name, BoundaryWindow()).update(facts)
        self._arrived, self._utilization = dict(report.figures), dict(report.utilization)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        replicas = Replicas(trainer.strategy, pl_module) if trainer.world_size > 1 else None
        figures = {name: window.figures(replicas) for name, window in self._windows.items()}
        figures |= self._arrived
        measured = {name: metrics_of(found) for name, found in figures.items()}
        values = {key_of(metric, n): v for n, found in measured.items() for metric, v in found.items()}
        values |= _over_boundaries(measured)
        timing = self._clock.read()
        self._remember(measured, values, timing)
        skipped = self._skipped(replicas)
        lags = {n: f.staleness for n, f in figures.items() if f.staleness is not None}
        ages = {key_of("dni_staleness", name): float(lag) for name, lag in lags.items()}
        shares = _shares(self._utilization, self._spent)
        row: dict[str, Tensor | float] = {**values, **timing, **self._memory, **skipped, **ages, **shares}
        pl_module.log_dict(row, on_step=True, on_epoch=False)  # what Lightning makes our own log_dict
        self._logged = tuple(row)
        self._measured, self._windows, self._arrived = True, {}, {}
        self._spent, self._utilization = self._utilization, {}
        self._clock.reset()
        reset_peak_memory(pl_module.device)

    def _skipped(self, replicas: Replicas | None) -> dict[str, float]:
        assert self._engine is not None
        skipped = self._engine.skipped
        if replicas is not None:
            names = list(lambdas_of(self._engine))
            own = torch.tensor([float(skipped.get(name, 0)) for name in names])
            totals = replicas.total(own.to(replicas.device)).tolist()
            # under a gradient scaler only those appear where something was found
            found = dict(zip(names, totals, strict=True))
            skipped = {name: int(n) for name, n in found.items() if n or name in skipped}
        return {key_of("dni_skipped", name): float(n) for name, n in skipped.items()}

    def _remember(
        self,
        measured: Mapping[str, Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
        timing: Mapping[str, float],
    ) -> None:
        floats = torch.stack([v.float() for v in values.values()]).tolist() if values else []
        numbers = dict(zip(values, floats, strict=True))
        for key, number in (numbers | dict(timing)).items():
            self._recent.setdefault(key, deque(maxlen=SUMMARIZED)).append(number)
        probed = [name for name, found in measured.items() if COSINE in found]
        if probed:
            cosine = {name: numbers[key_of(COSINE, name)] for name in probed}
            error = {name: numbers[key_of(ERROR, name)] for name in probed}
            self.history.append(Probe(self._step, cosine, error))

    def _settle_row(self, trainer: pl.Trainer) -> None:
        """Once the row of a measured step is written: no other shall repeat it, and summaries take it in."""
        if not self._logged:
            return
        forget_logged(trainer, self._logged)
        self._logged = ()
        if self._wandb is not None:
            self._wandb.summarize({key: sum(last) / len(last) for key, last in self._recent.items()})

    # ---- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """The probes so far."""
        return {
            "history": [probe.state_dict() for probe in self.history],
            "recent": {key: list(last) for key, last in self._recent.items()},
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved probes."""
        self.history = [Probe(**probe) for probe in state_dict["history"]]
        self._recent = {key: deque(last, maxlen=SUMMARIZED) for key, last in state_dict["recent"].items()}


def _shares(now: Mapping[int, Utilization], before: Mapping[int, Utilization]) -> dict[str, float]:
    """What each stage has spent its time on, as shares of the time between two rows, by key."""
    shares: dict[str, float] = {}
    for stage, spent in sorted(now.items()):
        *parts, whole = (a - b for a, b in zip(spent, before.get(stage, (0.0,) * 4), strict=True))
        if whole > 0:
            keys = (f"dni_{what}/stage_{stage}" for what in ("busy", "wait_in", "wait_out"))
            shares |= {key: part / whole for key, part in zip(keys, parts, strict=True)}
    return shares


def _over_boundaries(measured: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean cosine and the worst error of all boundaries, where any was probed."""
    cosines = [found[COSINE] for found in measured.values() if COSINE in found]
    errors = [found[ERROR] for found in measured.values() if ERROR in found]
    if not cosines:
        return {}
    return {"dni_mean_cosine": torch.stack(cosines).mean(), "dni_worst_error": torch.stack(errors).max()}
