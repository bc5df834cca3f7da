"""Time of a training step in two processes, side by side: ratios to Lightning's own DDPStrategy.

python benchmarks/ddp_step_time/main.py [--steps 200] [--turns 5] [--width 256]

A net of 64 -> 4 x width ReLU -> 10, batch 256 per process, Adam, gloo, one thread per process. The
contenders run after one another in the same two processes, and that `turns` times over; each ratio is the
median over turns of the median step.
"""

import argparse
import logging
import os
import platform
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni import DNIDDPStrategy
from lightning_dni.estimators import LinearEstimator, ZeroEstimator

CLASSES, FEATURES, HIDDEN, BATCH = 10, 64, 4, 256
BOUNDARIES = [f"net.{k}" for k in range(HIDDEN)]
LINEAR = partial(LinearEstimator, num_classes=CLASSES)
WARM_UP = 20  # steps
Batch = tuple[Tensor, Tensor]


class Net(pl.LightningModule):
    """The net that every contender trains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [FEATURES, *[width] * HIDDEN]
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*hidden, nn.Linear(width, CLASSES))

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """When every step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """One more step."""
        self.ends.append(time.perf_counter())


CONTENDERS: dict[str, Callable[[], Strategy]] = {
    "Lightning's DDPStrategy": DDPStrategy,
    "DNIDDPStrategy, lambda 1": partial(DNIDDPStrategy, BOUNDARIES, ZeroEstimator, bp_lambda=1.0),
    "DNIDDPStrategy, zero": partial(DNIDDPStrategy, BOUNDARIES, ZeroEstimator),
    "DNIDDPStrategy, linear": partial(DNIDDPStrategy, BOUNDARIES, LINEAR),
}


def step_time(contender: Callable[[], Strategy], width: int, steps: int) -> float:
    """Median seconds of a step."""
    torch.manual_seed(1)
    pool = [(torch.randn(BATCH, FEATURES), torch.randint(CLASSES, (BATCH,))) for _ in range(64)]
    batches = DataLoader([pool[k % len(pool)] for k in range(WARM_UP + steps)], batch_size=None)
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
    trainer.fit(Net(width), batches)
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
    turns = [
        {name: step_time(make, args.width, args.steps) for name, make in CONTENDERS.items()}
        for _ in range(args.turns)
    ]
    if rank == 0:
        show(turns, args)


def show(turns: list[dict[str, float]], args: argparse.Namespace) -> None:
    """Print medians, and ratios within turns."""
    table = Table(
        title=f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, 2 processes, gloo, "
        f"width {args.width}, {args.turns} turns of {args.steps} steps"
    )
    for heading in ("", "ms per step", "ratio", "lowest", "highest"):
        table.add_column(heading)
    plain = next(iter(CONTENDERS))
    for name in CONTENDERS:
        ratios = [t[name] / t[plain] for t in turns]
        median = statistics.median(t[name] for t in turns) * 1e3
        numbers = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, f"{median:.2f}", *(f"{n:.2f}" for n in numbers))
    Console(width=110).print(table)


def main() -> None:
    """Start two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(in_process, (port, args), nprocs=2)


if __name__ == "__main__":
    main()
