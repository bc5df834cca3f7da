"""Real compute on two processes: how many batches per second, and how soon a training loss is reached.

OMP_NUM_THREADS=1 python benchmarks/pipeline/learning.py --data_dir data [--steps 400] [--losses 0.3 0.1]

A perceptron on MNIST, the same weights, batches and rate in every row; one thread per process. A loss counts
as reached once the running mean of the training loss (weight 0.05 for the newest) is below it. Rows run after
one another on the same machine.
"""

import argparse
import csv
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from launch import run
from rich.console import Console
from rich.table import Table

from lightning_dni import DNIPipelineStrategy
from lightning_dni.demos import MLPClassifier, MNISTDataModule
from lightning_dni.estimators import LinearEstimator

HERE = Path(__file__).parent
BOUNDARIES = ["net.hidden_1"]
WARM_UP = 10


class Progress(pl.Callback):
    """When every step has ended, and the running mean of the loss by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """One more step."""
        loss = float(trainer.callback_metrics["train_loss"]) if trainer.is_global_zero else 0.0
        mean = 0.95 * self.losses[-1] + 0.05 * loss if self.losses else loss
        self.losses.append(mean)
        self.ends.append(time.perf_counter())


class Found(NamedTuple):
    """What one row has come to.

    Attributes:
        seconds: Per step, once it runs evenly.
        reached: Step at which each loss was reached; None where it was not.
        last: The running mean at the end.
    """

    seconds: float
    reached: list[int | None]
    last: float


def fit(strategy: Callable[[], object], devices: int, steps: int, data: Path, losses: list[float]) -> Found:
    """One process of a fit."""
    torch.manual_seed(0)
    module = MLPClassifier(784, hidden_size=1024, num_hidden=5, batch_norm=False, learning_rate=3e-4)
    progress = Progress()
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy=strategy(),  # type: ignore[arg-type]
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    torch.manual_seed(0)
    trainer.fit(module, MNISTDataModule(data_dir=str(data), batch_size=256))
    reached = [next((k for k, found in enumerate(progress.losses) if found < loss), None) for loss in losses]
    steady = progress.ends[WARM_UP:]
    return Found((steady[-1] - steady[0]) / (len(steady) - 1), reached, progress.losses[-1])


def dni(staleness: int) -> object:
    """Synthetic gradients."""
    estimator = partial(LinearEstimator, num_classes=10)
    rate = partial(torch.optim.Adam, lr=3e-4)
    return DNIPipelineStrategy(BOUNDARIES, estimator, estimator_optimizer=rate, staleness=staleness)


def exact(microbatches: int) -> object:
    """Exact backprop on the same stages."""
    return DNIPipelineStrategy(BOUNDARIES, schedule="1f1b", microbatches=microbatches)


ROWS: dict[str, tuple[Callable[[], object], int]] = {
    "one process, backprop": (lambda: "auto", 1),
    "1f1b, 2 microbatches": (partial(exact, 2), 2),
    "1f1b, 4 microbatches": (partial(exact, 4), 2),
    "1f1b, 8 microbatches": (partial(exact, 8), 2),
    "DNI, staleness 0": (partial(dni, 0), 2),
    "DNI, staleness 1": (partial(dni, 1), 2),
    "DNI, staleness 2": (partial(dni, 2), 2),
}


def show(found: dict[str, Found], losses: list[float]) -> None:
    """Print the table."""
    versions = f"torch {torch.__version__}, lightning {pl.__version__}"
    table = Table(title=f"{versions}, {platform.machine()}, {os.cpu_count()} cores, gloo")
    for column in ("", "ms per step", "speed", *(f"loss {loss}: s (steps)" for loss in losses), "last loss"):
        table.add_column(column)
    alone = found["one process, backprop"].seconds
    for name, row in found.items():
        cells = [f"{k * row.seconds:.1f} ({k})" if k is not None else "-" for k in row.reached]
        speed = f"{alone / row.seconds:.2f}"
        table.add_row(name, f"{row.seconds * 1e3:.1f}", speed, *cells, f"{row.last:.4f}")
    Console(width=120).print(table)


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--losses", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--csv", type=Path, default=HERE / "learning.csv")
    args = parser.parse_args()
    found: dict[str, Found] = {}
    for name, (strategy, devices) in ROWS.items():
        process = partial(fit, strategy, devices, args.steps, args.data_dir, args.losses)
        found[name] = run(process, devices, grouped=False)[0]
        Console().print(f"{name}: {found[name].seconds * 1e3:.1f} ms per step")
    show(found, args.losses)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["contender", "seconds per step", *(f"steps to {v}" for v in args.losses), "last loss"]
        )
        writer.writerows([name, row.seconds, *row.reached, row.last] for name, row in found.items())


if __name__ == "__main__":
    main()
