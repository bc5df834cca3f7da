"""Time of a training step, side by side in one process: ratios, not absolute times.

python benchmarks/step_time/main.py [--turns 250] [--width 256]

A net of 64 -> 4 x 256 ReLU -> 10, batch 256, Adam, one thread, linear estimators with labels after
every hidden layer. The contenders take turns of four steps, so that what they are compared with has run
next to them, and yet caches are as warm as in training; each ratio is the median over such turns.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni import DNIStrategy
from lightning_dni.core import BoundarySpec, DNIEngine, EstimatorFactory, LeafSpec
from lightning_dni.estimators import (
    BackpropEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    LinearEstimator,
)

FEATURES, HIDDEN, CLASSES = 64, 4, 10
BOUNDARIES = [f"net.{k}" for k in range(HIDDEN)]
FACTORY = partial(LinearEstimator, num_classes=CLASSES)
ADAM = partial(torch.optim.Adam, lr=1e-3)
ESTIMATOR_ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
STEPS_PER_TURN = 4
WARM_UP = 8  # turns
Batch = tuple[Tensor, Tensor]


class Net(pl.LightningModule):
    """The net that every contender trains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (FEATURES, *[width] * HIDDEN)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*hidden, nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.net(x)

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return ADAM(self.parameters())


def batches(steps: int) -> DataLoader[Batch]:
    """Random batches with random labels, too many to be learnt: saturated nets compute with denormals."""
    torch.manual_seed(1)
    pool = [(torch.randn(256, FEATURES), torch.randint(CLASSES, (256,))) for _ in range(64)]
    return DataLoader([pool[k % len(pool)] for k in range(steps)], batch_size=None)


def backprop(width: int, steps: int) -> Iterator[None]:
    """A plain torch loop."""
    model = Net(width)
    optimizer = model.configure_optimizers()
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = model.training_step(batch)
        loss.backward()
        optimizer.step()
        yield


def by_hand(width: int, steps: int) -> Iterator[None]:
    """The decoupled loop with the same estimators, written out."""
    model = Net(width)
    optimizer = model.configure_optimizers()
    specs = [BoundarySpec(name, (LeafSpec((width,), torch.float32),)) for name in BOUNDARIES]
    estimators = [FACTORY(spec) for spec in specs]
    estimator_optimizer = ESTIMATOR_ADAM([p for e in estimators for p in e.parameters()])
    for x, y in batches(steps):
        optimizer.zero_grad()
        estimator_optimizer.zero_grad()
        h, below = x, None
        for stage, estimator in zip(model.net, estimators, strict=False):
            out = stage(h)
            h = out.detach().requires_grad_()
            (synthetic,), _ = estimator.synthesize((h.detach(),), y, None)
            out.backward(synthetic.detach() / len(y))
            if below is not None:
                learn(*below, rows=len(y))
            below = synthetic, h
        F.cross_entropy(model.net[-1](h), y).backward()
        learn(*below, rows=len(y))
        optimizer.step()
        estimator_optimizer.step()
        yield


def learn(synthetic: Tensor, h: Tensor, rows: int) -> None:
    """Accumulate the gradient of the SG loss."""
    (F.mse_loss(synthetic, h.grad * rows, reduction="sum") / rows).backward()


def engine(width: int, steps: int, factory: EstimatorFactory = FACTORY) -> Iterator[None]:
    """The engine in a plain torch loop."""
    model = Net(width)
    optimizer = model.configure_optimizers()
    dni = DNIEngine(model, BOUNDARIES, factory, estimator_optimizer=ESTIMATOR_ADAM)
    with dni:
        for batch in batches(steps):
            optimizer.zero_grad()
            with dni.training_step(batch):
                loss = model.training_step(batch)
            dni.backward(loss)
            optimizer.step()
            dni.update_estimators()
            yield


class Turns:
    """Lets contenders, each in its own thread, run some steps after one another, one thread at a time."""

    def __init__(self, contenders: dict[str, Callable[[int, Callable[[], None]], None]], turns: int) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in contenders}
        self._may_go = {name: threading.Semaphore(0) for name in contenders}
        self._done = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=(name, contender, turns * STEPS_PER_TURN), daemon=True)
            for name, contender in contenders.items()
        ]
        for thread in self._threads:
            thread.start()
        for _ in range(turns + 1):
            for name in contenders:
                self._may_go[name].release()
                self._done.acquire()

    def _run(self, name: str, contender: Callable[[int, Callable[[], None]], None], steps: int) -> None:
        began, done = time.perf_counter(), 0

        def step() -> None:
            nonlocal began, done
            done += 1
            if done % STEPS_PER_TURN:
                return
            self.times[name].append((time.perf_counter() - began) / STEPS_PER_TURN)
            self._done.release()
            self._may_go[name].acquire()
            began = time.perf_counter()

        self._may_go[name].acquire()
        try:
            contender(steps, step)
        finally:
            self._done.release()


class StepEnd(pl.Callback):
    """Counts the steps of a Trainer."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def on_train_batch_end(self, *_: object) -> None:
        """One more step."""
        self.step()


def in_loop(loop: Callable[[int], Iterator[None]], steps: int, step: Callable[[], None]) -> None:
    """A plain loop."""
    for _ in loop(steps):
        step()


def in_trainer(strategy: Callable[[], object], width: int, steps: int, step: Callable[[], None]) -> None:
    """A Trainer."""
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        strategy=strategy(),
        callbacks=[StepEnd(step)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(width), batches(steps))


def contenders(width: int) -> dict[str, Callable[[int, Callable[[], None]], None]]:
    """What takes turns, each given the number of steps and what to call after one."""
    kinds = {
        "engine, backprop": BackpropEstimator,
        "engine, FA": FeedbackAlignmentEstimator,
        "engine, DFA": DirectFeedbackAlignmentEstimator,
    }
    return {
        "backprop loop": partial(in_loop, partial(backprop, width)),
        "DNI loop by hand": partial(in_loop, partial(by_hand, width)),
        "engine loop": partial(in_loop, partial(engine, width)),
        **{name: partial(in_loop, partial(engine, width, factory=kind)) for name, kind in kinds.items()},
        "plain Trainer": partial(in_trainer, lambda: "auto", width),
        "Trainer, DNIStrategy": partial(
            in_trainer, lambda: DNIStrategy(BOUNDARIES, FACTORY, estimator_optimizer=ESTIMATOR_ADAM), width
        ),
    }


def ratios(turns: list[dict[str, float]]) -> dict[str, float]:
    """The ratios that are promised: medians over the turns."""
    median = statistics.median
    added = [
        median(t["Trainer, DNIStrategy"] - t["engine loop"] for t in turns),
        median(t["plain Trainer"] - t["backprop loop"] for t in turns),
    ]
    return {
        "engine / by hand (at most 1.10)": median(t["engine loop"] / t["DNI loop by hand"] for t in turns),
        "engine / backprop (at most 2.1)": median(t["engine loop"] / t["backprop loop"] for t in turns),
        "by hand / backprop": median(t["DNI loop by hand"] / t["backprop loop"] for t in turns),
        "engine, backprop / backprop": median(t["engine, backprop"] / t["backprop loop"] for t in turns),
        "engine, FA / backprop (at most 1.25)": median(t["engine, FA"] / t["backprop loop"] for t in turns),
        "engine, DFA / backprop (at most 1.25)": median(t["engine, DFA"] / t["backprop loop"] for t in turns),
        "what the Trainer adds, DNI / plain (at most 1.1)": added[0] / added[1],
    }


def main() -> None:
    """Take turns, then print times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=250)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    if os.environ.get("MALLOC_ARENA_MAX") != "1":  # threads shall find memory as one thread alone would
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_ARENA_MAX": "1"})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = Turns(contenders(args.width), args.turns + WARM_UP).times
    turns = [dict(zip(times, t, strict=True)) for t in zip(*times.values(), strict=True)][WARM_UP:]
    table = Table(
        title=f"torch {torch.__version__}, {platform.machine()}, 1 thread, "
        f"{args.width} units, {len(turns)} turns of {STEPS_PER_TURN} steps"
    )
    for heading in ("", "median", "10 %", "90 %"):
        table.add_column(heading)
    for name in times:
        low, *_, high = statistics.quantiles([t[name] * 1e3 for t in turns], n=10)
        table.add_row(
            f"{name}, ms",
            f"{statistics.median(t[name] for t in turns) * 1e3:.2f}",
            f"{low:.2f}",
            f"{high:.2f}",
        )
    for name, value in ratios(turns).items():
        table.add_row(name, f"{value:.2f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
