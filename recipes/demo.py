"""Train the digits recipes one after the other, print one table, draw one picture (`make demo`)."""

import csv
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import wandb
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_dni.callbacks import GradientMonitor
from lightning_dni.cli import run
from lightning_dni.demos import DigitsDataModule, MLPClassifier
from lightning_dni.estimators import LinearEstimator

RECIPES = Path(__file__).parent
COMPARED = ("digits_backprop", "digits_dni", "digits_critic")
PIPELINE = "digits_pipeline"
LAST_PROBES = 10


class Curve(pl.Callback):
    """Keeps the validation accuracy of every epoch and the time of every step."""

    def __init__(self) -> None:
        self.accuracy: list[tuple[int, float]] = []
        self._ends: list[list[float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """A new row of step ends: validation lies between epochs."""
        self._ends.append([])

    def on_train_batch_end(self, *_: Any) -> None:
        """One more step."""
        self._ends[-1].append(time.perf_counter())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One more point."""
        if not trainer.sanity_checking:
            self.accuracy.append((trainer.global_step, float(trainer.callback_metrics["val_accuracy"])))

    @property
    def step_time(self) -> float:
        """Median seconds per step; the few steps that are probed do not move it."""
        return statistics.median(b - a for ends in self._ends for a, b in pairwise(ends))


@dataclass
class Result:
    """What one recipe gave."""

    recipe: str
    test_accuracy: float
    learns: str
    accuracy: list[tuple[int, float]]
    step_time: float
    monitor: GradientMonitor | None
    wandb_file: str

    def last(self, quantity: str) -> str:
        """Mean over boundaries and the last probes."""
        if self.monitor is None:
            return "-"
        probes = self.monitor.history[-LAST_PROBES:]
        return f"{statistics.mean(v for p in probes for v in getattr(p, quantity).values()):.2f}"


def train(recipe: str) -> Result:
    """Fit and test one recipe."""
    curve = Curve()
    cli = run(["fit", "--config", str(RECIPES / f"{recipe}.yaml")], callbacks=[curve])
    test = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    engine = getattr(cli.trainer.strategy, "engine", None)
    learns = (
        "(backprop)"
        if engine is None
        else ", ".join(sorted({"yes" if e.learns_from_network else "no" for e in engine.estimators.values()}))
    )
    monitors = [c for c in cli.trainer.callbacks if isinstance(c, GradientMonitor)]
    file = cli.trainer.logger.experiment.settings.sync_file
    wandb.finish()
    monitor = monitors[0] if monitors else None
    return Result(recipe, test["test_accuracy"], learns, curve.accuracy, curve.step_time, monitor, file)


def train_in_stages(recipe: str) -> Result:
    """Fit a recipe of several processes by its command, as a user does, and test what it has saved."""
    command = [sys.executable, "-m", "lightning_dni", "fit", "--config", str(RECIPES / f"{recipe}.yaml")]
    subprocess.run(command, check=True)
    runs = Path("runs") / recipe
    with (runs / "csv/last/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = [(int(row["step"]), float(row["val_accuracy"])) for row in rows if row["val_accuracy"]]
    times = [float(row["dni_step_time"]) for row in rows if row["dni_step_time"]]
    module = MLPClassifier.load_from_checkpoint(_newest(runs, "*.ckpt"), weights_only=True)
    quiet = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    test = quiet.test(module, DigitsDataModule(), verbose=False)[0]
    wandb_file = str(_newest(runs, "run-*.wandb"))
    step_time = statistics.median(times)
    learns = "yes" if LinearEstimator.needs else "no"
    return Result(recipe, test["test_accuracy"], learns, accuracy, step_time, None, wandb_file)


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def show(results: list[Result]) -> None:
    """Print the table."""
    table = Table(
        title="scikit-learn digits, 3 hidden layers of 256 units, cut after each (pipeline: after one)"
    )
    for heading in (
        "recipe",
        "learns from the\nnetwork above",
        "test\naccuracy",
        "step time,\nms",
        "SG\nerror",
        "cosine",
    ):
        table.add_column(heading, no_wrap=True)
    for r in results:
        table.add_row(
            r.recipe,
            r.learns,
            f"{r.test_accuracy:.3f}",
            f"{r.step_time * 1e3:.1f}",
            r.last("error"),
            r.last("cosine"),
        )
    console = Console()
    console.print(table)
    console.print(
        "SG error: norm of (synthetic - true gradient) over norm of true, 0 is perfect; cosine: of the two; "
        f"both averaged over boundaries and the last {LAST_PROBES} probes.\n"
        "A low cosine does not mean that a stage does not learn; compare the accuracies. On one device "
        "synthetic gradients cost time: they save it where stages run on different devices."
    )


def draw(results: list[Result], path: Path) -> None:
    """Accuracy of every recipe, and cosine at the boundaries of those with synthetic gradients."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, cosine = figure.subplots(1, 2)
    for k, r in enumerate(results):
        accuracy.plot(*zip(*r.accuracy, strict=True), color=f"C{k}", label=r.recipe, marker=".")
        history = r.monitor.history if r.monitor else []
        for style, name in zip(("-", "--", ":"), history[0].cosine if history else (), strict=False):
            points = [(p.step, p.cosine[name]) for p in history]
            cosine.plot(*zip(*points, strict=True), style, color=f"C{k}", label=f"{r.recipe}, {name}")
    accuracy.set(title="validation accuracy", xlabel="step", ylim=(0, 1))
    cosine.set(title="cosine of synthetic and true gradient", xlabel="step", ylim=(-1, 1))
    for axes in (accuracy, cosine):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything."""
    warnings.filterwarnings("ignore", module="lightning|torch")
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)
    results = [*map(train, COMPARED), train_in_stages(PIPELINE)]
    picture = Path("runs/demo.png")
    draw(results, picture)
    show(results)
    console = Console(soft_wrap=True)
    console.print(f"Picture: {picture}")
    for r in results:
        console.print(f"W&B run of {r.recipe}, offline: {r.wandb_file}")
    console.print(
        "Look at one in the terminal with `wandb leet FILE`, or upload it with `wandb sync FOLDER`."
    )


if __name__ == "__main__":
    main()
