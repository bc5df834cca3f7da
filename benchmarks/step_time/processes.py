"""Time of a training step in two processes, side by side: ratios to Lightning's own DDPStrategy.

python benchmarks/step_time/processes.py [--steps 30] [--turns 20] [--widths 256 1024] [--keep]

The net of main.py, batch 256 per process, Adam, gloo, one thread per process. The contenders run after one
another in the same two processes, and that `turns` times over; each ratio is the median over turns of the
median step. With `--keep` the figures go to results.csv and the README.
"""

import argparse
import logging
import os
import platform
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, Strategy
from net import BOUNDARIES, LINEAR, Net, batches
from report import Figure, keep, table

from lightning_dni import DNIDDPStrategy
from lightning_dni.estimators import ZeroEstimator

WARM_UP = 20  # steps


class Clock(pl.Callback):
    """When every step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """One more step."""
        self.ends.append(time.perf_counter())


CONTENDERS: dict[str, Callable[[], Strategy]] = {
    "Lightning's `DDPStrategy`": DDPStrategy,
    "`DNIDDPStrategy`, `bp_lambda=1`": partial(DNIDDPStrategy, BOUNDARIES, ZeroEstimator, bp_lambda=1.0),
    "`DNIDDPStrategy`, zero estimators": partial(DNIDDPStrategy, BOUNDARIES, ZeroEstimator),
    "`DNIDDPStrategy`, linear estimators": partial(DNIDDPStrategy, BOUNDARIES, LINEAR),
}


def step_time(contender: Callable[[], Strategy], width: int, steps: int) -> float:
    """Median seconds of a step."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=contender(),
        callbacks=[clock],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(width), batches(WARM_UP + steps))
    ends = clock.ends[WARM_UP - 1 :]
    return statistics.median(b - a for a, b in pairwise(ends))


def in_process(rank: int, port: int, args: argparse.Namespace) -> None:
    """Run all contenders as one of the two processes; the first one prints."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: list[Figure] = []
    for width in args.widths:
        turns = [
            {name: step_time(make, width, args.steps) for name, make in CONTENDERS.items()}
            for _ in range(args.turns)
        ]
        found += figures(turns, width)
    if rank == 0:
        print("\n".join(table(found)))
        print(f"torch {torch.__version__}, {platform.machine()}, {args.turns} turns of {args.steps} steps")
        if args.keep:
            keep(found)


def figures(turns: list[dict[str, float]], width: int) -> Iterator[Figure]:
    """What the README's table has, of all turns."""
    plain, *others = CONTENDERS
    times = [1e3 * turn[plain] for turn in turns]
    yield Figure(2, f"{plain}, ms per step", width, statistics.median(times), min(times), max(times))
    for name in others:
        ratios = [turn[name] / turn[plain] for turn in turns]
        row = f"{name} / {plain}"
        yield Figure(2, row, width, statistics.median(ratios), min(ratios), max(ratios))


def main() -> None:
    """Start two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--keep", action="store_true", help="write results.csv and the README's table")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(in_process, (port, args), nprocs=2)


if __name__ == "__main__":
    main()
