"""Real compute on two processes: how many batches per second, and how soon a training loss is reached.

OMP_NUM_THREADS=1 python benchmarks/pipeline/learning.py --data_dir data [--steps 250] [--width 1024]

A perceptron on MNIST, the same weights and batches in every row; one thread per process. A loss counts as
reached once the running mean of the training loss (weight 0.05 for the newest) is below it. Every method has
the rates of a small grid that were soonest at the last of the losses with seed 0; the table is of the seeds
after it. Rows run after one another on the same machine, one seed after another.
"""

import argparse
import csv
import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from contenders import TORCH
from launch import kept_in, run
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.nn import functional as F

from lightning_dni import DNIPipelineStrategy
from lightning_dni.demos import MLPClassifier, MNISTDataModule
from lightning_dni.estimators import (
    CriticEstimator,
    DelayedGradientEstimator,
    LinearEstimator,
    LowRankEstimator,
)

HERE = Path(__file__).parent
WARM_UP = 10
CUT = 3
"""Layers below the boundary of torch's pipelines, whose two stages are then about as long."""
RATES, ESTIMATOR_RATES = (3e-4, 1e-3, 3e-3), (1e-3, 1e-2, 3e-2)


class Progress(pl.Callback):
    """When every step has ended, and the running mean of the loss by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """One more step."""
        self.note(float(trainer.callback_metrics["train_loss"]) if trainer.is_global_zero else 0.0)

    def note(self, loss: float) -> None:
        """One more step, of that loss."""
        mean = 0.95 * self.losses[-1] + 0.05 * loss if self.losses else loss
        self.losses.append(mean)
        self.ends.append(time.perf_counter())


class Rates(NamedTuple):
    """Learning rates of the network and of the estimators."""

    net: float
    estimators: float


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        strategy: Makes it, given the rates; a name in `TORCH` and microbatches for torch's own pipeline.
        devices: How many processes.
        rates_of: Row whose rates it has; None to try the grid.
        learns: Whether it has estimators with a rate of their own.
    """

    strategy: Callable[[Rates], object] | tuple[str, int]
    devices: int = 2
    rates_of: str | None = None
    learns: bool = True


class Found(NamedTuple):
    """What one fit has come to.

    Attributes:
        seconds: Per step, once it runs evenly.
        reached: Step at which each loss was reached; None where it was not.
        last: The running mean at the end.
    """

    seconds: float
    reached: list[int | None]
    last: float


class Task(NamedTuple):
    """What all fits have in common.

    Attributes:
        steps: Length of a fit.
        data: Folder of the data.
        losses: Those to reach.
        width: Units per hidden layer.
    """

    steps: int
    data: Path
    losses: list[float]
    width: int

    def fit(self, row: Row, rates: Rates, seed: int) -> Found:
        """A fit of `row`, in processes of its own."""
        if isinstance(row.strategy, tuple):
            return run(partial(self._torch, *row.strategy, rates, seed), 2, grouped=True)[-1]
        process = partial(self._process, row, rates, seed)
        return run(process, row.devices, grouped=False)[0]

    def _made(self, rates: Rates, seed: int) -> tuple[MLPClassifier, MNISTDataModule]:
        torch.manual_seed(seed)
        module = MLPClassifier(
            784, hidden_size=self.width, num_hidden=5, batch_norm=False, learning_rate=rates.net
        )
        torch.manual_seed(seed)
        return module, MNISTDataModule(data_dir=str(self.data), batch_size=256)

    def _found(self, progress: Progress) -> Found:
        reached = [next((k for k, v in enumerate(progress.losses) if v < loss), None) for loss in self.losses]
        steady = progress.ends[WARM_UP:]
        return Found((steady[-1] - steady[0]) / (len(steady) - 1), reached, progress.losses[-1])

    def _torch(self, schedule: str, microbatches: int, rates: Rates, seed: int) -> Found:
        """A process of torch's own pipeline of two stages, in a plain loop."""
        module, data = self._made(rates, seed)
        data.prepare_data()
        data.setup()
        layers, rank = list(module.net.children()), dist.get_rank()
        part = nn.Sequential(nn.Flatten(), *(layers[:CUT] if rank == 0 else layers[CUT:]))
        rows = 256 // microbatches
        given, made = torch.zeros(rows, 1, 28, 28), torch.zeros(rows, self.width, requires_grad=True)
        inputs, outputs = (given, made) if rank == 0 else (made, torch.zeros(rows, 10, requires_grad=True))
        stage = PipelineStage(
            part, rank, 2, torch.device("cpu"), input_args=(inputs,), output_args=(outputs,)
        )
        runs = TORCH[schedule](stage, microbatches, loss_fn=F.cross_entropy)
        optimizer = torch.optim.Adam(part.parameters(), lr=rates.net)
        progress, batches = Progress(), itertools.cycle(data.train_dataloader())
        batches = (batch for batch in batches if len(batch[0]) == 256)  # its shapes are fixed
        gc.collect()  # as our strategy does
        for x, y in itertools.islice(batches, self.steps):
            optimizer.zero_grad()
            losses: list[torch.Tensor] = []
            if rank == 0:
                runs.step(x)
            else:
                runs.step(target=y, losses=losses, return_outputs=False)
            optimizer.step()
            progress.note(float(torch.stack(losses).mean()) if losses else 0.0)
        return self._found(progress)

    def _process(self, row: Row, rates: Rates, seed: int) -> Found:
        module, data = self._made(rates, seed)
        progress = Progress()
        assert not isinstance(row.strategy, tuple)
        trainer = pl.Trainer(
            max_epochs=-1,
            max_steps=self.steps,
            accelerator="cpu",
            devices=row.devices,
            strategy=row.strategy(rates),  # type: ignore[arg-type]
            callbacks=[progress],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data)
        return self._found(progress)


def dni(estimator: Callable[..., object], boundary: str, staleness: int, rates: Rates) -> object:
    """Synthetic gradients."""
    return DNIPipelineStrategy(
        [boundary],
        partial(estimator, num_classes=10),  # type: ignore[arg-type]
        estimator_optimizer=partial(torch.optim.Adam, lr=rates.estimators),
        staleness=staleness,
    )


def exact(microbatches: int, rates: Rates) -> object:
    """Exact backprop on two stages."""
    return DNIPipelineStrategy(["net.hidden_1"], schedule="1f1b", microbatches=microbatches)


def delayed(staleness: int, rates: Rates) -> object:
    """True gradients of earlier batches, with the weights of then."""
    estimator = partial(DelayedGradientEstimator, delay=staleness)
    return DNIPipelineStrategy(["net.hidden_2"], estimator, staleness=staleness)


def alone(rates: Rates) -> object:
    """Plain backprop."""
    return "auto"


BACKPROP, CRITIC = "one process, backprop", "DNI, critic, staleness 2"
critic = partial(CriticEstimator, label_share=0.5)

# each with the boundary at which it is fastest: linear estimators take the time of most of a layer
ROWS: dict[str, Row] = {
    BACKPROP: Row(alone, devices=1, learns=False),
    **{f"1f1b, {m} microbatches": Row(partial(exact, m), rates_of=BACKPROP, learns=False) for m in (2, 4, 8)},
    **{
        f"torch {schedule}, {m} microbatches": Row((schedule, m), rates_of=BACKPROP, learns=False)
        for schedule in TORCH
        for m in (2, 4, 8)
    },
    "DNI, linear, staleness 2": Row(partial(dni, LinearEstimator, "net.hidden_1", 2)),
    "DNI, low-rank, staleness 2": Row(partial(dni, LowRankEstimator, "net.hidden_2", 2)),
    CRITIC: Row(partial(dni, critic, "net.hidden_2", 2)),
    "DNI, critic, staleness 1": Row(partial(dni, critic, "net.hidden_2", 1), rates_of=CRITIC),
    "DNI, critic, staleness 0": Row(partial(dni, critic, "net.hidden_2", 0), rates_of=CRITIC),
    "delayed gradient, staleness 1": Row(partial(delayed, 1), learns=False),
    "delayed gradient, staleness 2": Row(partial(delayed, 2), learns=False),
}


def choose_rates(task: Task, row: Row) -> Rates:
    """Those of the grid that are soonest at the last loss, and lowest at the end where none gets there."""
    grid = [Rates(*pair) for pair in itertools.product(RATES, ESTIMATOR_RATES if row.learns else (0.0,))]

    def how_late(rates: Rates) -> tuple[float, float]:
        found = task.fit(row, rates, seed=0)
        Console().print(f"{rates}: {found.reached} {found.last:.4f}")
        step = found.reached[-1]
        return (float("inf") if step is None else step), found.last

    return min(grid, key=how_late)


def summarise(found: list[Found], place: int) -> tuple[str, str]:
    """Mean seconds and steps to a loss over seeds, and in brackets how many got there if not all."""
    steps = [(fit.reached[place], fit.seconds) for fit in found]
    there = [(k, k * seconds) for k, seconds in steps if k is not None]
    if not there:
        return "-", "-"
    mean_steps, mean_seconds = (statistics.fmean(column) for column in zip(*there, strict=True))
    some = "" if len(there) == len(found) else f" ({len(there)} of {len(found)})"
    return f"{mean_seconds:.1f}{some}", f"{mean_steps:.0f}"


def show(found: dict[str, list[Found]], chosen: dict[str, Rates], losses: list[float]) -> None:
    """Print the table."""
    versions = f"torch {torch.__version__}, lightning {pl.__version__}"
    table = Table(title=f"{versions}, {platform.machine()}, {os.cpu_count()} cores, gloo")
    columns = [column for loss in losses for column in (f"s to loss {loss}", "steps")]
    for column in ("", "rates", "ms per step", "speed", *columns, "last loss"):
        table.add_column(column)
    milliseconds = {
        name: 1e3 * statistics.median(fit.seconds for fit in fits) for name, fits in found.items()
    }
    for name, fits in found.items():
        cells = [cell for place in range(len(losses)) for cell in summarise(fits, place)]
        rates = ", ".join(f"{rate:g}" for rate in chosen[name] if rate)
        speed = f"{milliseconds[BACKPROP] / milliseconds[name]:.2f}"
        last = f"{statistics.fmean(fit.last for fit in fits):.3f}"
        table.add_row(name, rates, f"{milliseconds[name]:.1f}", speed, *cells, last)
    Console(width=140).print(table)


def write(found: dict[str, list[Found]], chosen: dict[str, Rates], losses: list[float], path: Path) -> None:
    """All fits of the table, one line each."""
    headings = ["contender", "rate", "estimator rate", "seed", "seconds per step"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*headings, *(f"steps to {loss}" for loss in losses), "last loss"])
        for name, fits in found.items():
            for seed, fit in enumerate(fits, start=1):
                writer.writerow([name, *chosen[name], seed, fit.seconds, *fit.reached, fit.last])


def main() -> None:
    """Choose rates, then run every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--losses", type=float, nargs="+", default=[0.3, 0.2])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[], help="pairs, net and estimators, in place of the grid"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains any of these")
    parser.add_argument("--csv", type=Path, default=None, help="learning.csv for the whole run, else none")
    args = parser.parse_args()
    path = kept_in(HERE / "learning.csv", parser, args, "data_dir")
    task = Task(args.steps, args.data_dir, args.losses, args.width)
    chosen: dict[str, Rates] = {}
    given = iter(zip(args.rates[::2], args.rates[1::2], strict=True))
    rows = {name: row for name, row in ROWS.items() if any(word in name for word in args.only)}
    for name, row in rows.items():
        source = row.rates_of or name
        if source not in chosen:
            pair = next(given, None)
            chosen[source] = choose_rates(task, ROWS[source]) if pair is None else Rates(*pair)
            Console().print(f"{source}: {chosen[source]}")
        chosen[name] = chosen[source]
    found: dict[str, list[Found]] = {name: [] for name in rows}
    for seed in range(1, args.seeds + 1):
        for name, row in rows.items():
            found[name].append(task.fit(row, chosen[name], seed))
            Console().print(f"{name}, seed {seed}: {found[name][-1].seconds * 1e3:.1f} ms per step")
    show(found, chosen, args.losses)
    if path is not None:
        write(found, chosen, args.losses, path)


if __name__ == "__main__":
    main()
