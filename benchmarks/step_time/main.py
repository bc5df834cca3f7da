"""Time of a training step, side by side in one process: ratios, not absolute times.

python benchmarks/step_time/main.py [--turns 120] [--widths 256 1024] [--keep]

A net of 64 -> 4 x 256 (or 1,024) ReLU -> 10, batch 256, Adam, one thread, linear estimators with labels after
every hidden layer. The contenders take turns of four steps, so that what they are compared with has run
next to them, and yet caches are as warm as in training; each ratio is the median over such turns.
With `--keep` the figures go to results.csv and the README.
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

import lightning.pytorch as pl
import torch
from net import BOUNDARIES, LINEAR, Net, batches
from report import Figure, keep, table
from torch import Tensor
from torch.nn import functional as F

from lightning_dni import DNIStrategy
from lightning_dni.core import BoundarySpec, DNIEngine, EstimatorFactory, LeafSpec
from lightning_dni.estimators import (
    BackpropEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
)

ESTIMATOR_ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)
STEPS_PER_TURN = 4
WARM_UP = 8  # turns
FEEDBACK: dict[str, EstimatorFactory] = {
    kind.__name__: kind
    for kind in (BackpropEstimator, FeedbackAlignmentEstimator, DirectFeedbackAlignmentEstimator)
}


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
    estimators = [LINEAR(spec) for spec in specs]
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


def engine(width: int, steps: int, factory: EstimatorFactory = LINEAR) -> Iterator[None]:
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
        self._failed: list[BaseException] = []
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
                if self._failed:
                    raise self._failed[0]

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
        except BaseException as error:
            self._failed.append(error)
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
    return {
        "backprop loop": partial(in_loop, partial(backprop, width)),
        "DNI loop by hand": partial(in_loop, partial(by_hand, width)),
        "engine loop": partial(in_loop, partial(engine, width)),
        **{name: partial(in_loop, partial(engine, width, factory=kind)) for name, kind in FEEDBACK.items()},
        "plain Trainer": partial(in_trainer, lambda: "auto", width),
        "Trainer, DNIStrategy": partial(
            in_trainer, lambda: DNIStrategy(BOUNDARIES, LINEAR, estimator_optimizer=ESTIMATOR_ADAM), width
        ),
    }


def figures(turns: list[dict[str, float]], width: int) -> Iterator[Figure]:
    """What the README's table has, of all turns."""
    values = {
        "backprop, ms per step": [1e3 * t["backprop loop"] for t in turns],
        "engine / the same loop written by hand": [t["engine loop"] / t["DNI loop by hand"] for t in turns],
        "engine / backprop": [t["engine loop"] / t["backprop loop"] for t in turns],
        "the loop by hand / backprop": [t["DNI loop by hand"] / t["backprop loop"] for t in turns],
        **{
            f"engine with `{name}` / backprop": [t[name] / t["backprop loop"] for t in turns]
            for name in FEEDBACK
        },
    }
    for row, found in values.items():
        low, *_, high = statistics.quantiles(found, n=10)
        yield Figure(1, row, width, statistics.median(found), low, high)
    # differences of single turns may be next to zero, so that their ratios say nothing
    ours = statistics.median(t["Trainer, DNIStrategy"] - t["engine loop"] for t in turns)
    added = ours / statistics.median(t["plain Trainer"] - t["backprop loop"] for t in turns)
    yield Figure(1, "what the Trainer adds: with `DNIStrategy` / plain", width, added, added, added)


def main() -> None:
    """Take turns at each width, then print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=120)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--keep", action="store_true", help="write results.csv and the README's table")
    args = parser.parse_args()
    if os.environ.get("MALLOC_ARENA_MAX") != "1":  # threads shall find memory as one thread alone would
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_ARENA_MAX": "1"})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: list[Figure] = []
    for width in args.widths:
        times = Turns(contenders(width), args.turns + WARM_UP).times
        turns = [dict(zip(times, t, strict=True)) for t in zip(*times.values(), strict=True)][WARM_UP:]
        found += figures(turns, width)
    print("\n".join(table(found)))
    print(f"torch {torch.__version__}, {platform.machine()}, {args.turns} turns of {STEPS_PER_TURN} steps")
    if args.keep:
        keep(found)


if __name__ == "__main__":
    main()
