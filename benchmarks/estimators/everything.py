"""All that the README's tables need, one after another, for half a day on one core.

OMP_NUM_THREADS=1 python benchmarks/estimators/everything.py [--mnist data/mnist] [--fashion data/fashion]

What results.csv holds is not repeated.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import main
import report
from rows import NETS, rows_of

SHARE, STEPS, LOCAL = "critic, label share", "critic, label share, 4 steps", "local loss"
BEHIND = ("critic", "Sobolev, label share", "cDNI")
LEFT_OUT = ("backprop", STEPS, "Sobolev, label share")
CONVOLUTIONAL = tuple(row for row in rows_of(NETS["fashion-cnn"]) if row not in LEFT_OUT)


class Task(NamedTuple):
    """Some rows of one net; fields are options of main.py, `rows` without backprop, none for all."""

    net: str
    depth: int
    seeds: int
    rows: tuple[str, ...] = ()
    rates_of: int | None = None
    steps: int = 1000

    def words(self, folders: dict[str, Path]) -> Iterator[str]:
        """As main.py reads them."""
        folder = folders["fashion" if self.net.startswith("fashion") else "mnist"]
        yield from (f"--net={self.net}", f"--data-dir={folder}", f"--steps={self.steps}")
        yield from (f"--depth={self.depth}", f"--seeds={self.seeds}")
        yield from () if self.rates_of is None else (f"--rates-of={self.rates_of}",)
        yield from ("--rows", "backprop", *self.rows) if self.rows else ()


TASKS = (
    Task("mnist-mlp", 6, 5),
    Task("mnist-mlp", 6, 10, (SHARE, LOCAL, STEPS)),
    Task("mnist-mlp", 3, 10, (SHARE, LOCAL), rates_of=6),
    Task("mnist-mlp", 10, 10, (SHARE, LOCAL), rates_of=6),
    Task("mnist-mlp", 20, 10, (SHARE, LOCAL), rates_of=6),
    Task("mnist-mlp", 20, 2, BEHIND, rates_of=6),
    Task("mnist-mlp", 3, 20, (STEPS,)),
    Task("mnist-mlp", 3, 13, (LOCAL,)),
    Task("mnist-mlp", 10, 10, (STEPS,)),
    Task("mnist-mlp", 20, 8, (STEPS,)),
    Task("mnist-mlp-512", 3, 10, (STEPS,)),
    Task("mnist-mlp-512", 6, 10, (STEPS,)),
    Task("mnist-mlp-512", 10, 5, (STEPS,), rates_of=6),
    Task("mnist-mlp-512", 20, 5, (STEPS,)),
    Task("mnist-mlp-1024", 6, 5, (STEPS,)),
    Task("fashion-mlp", 6, 5),
    Task("fashion-cnn", 3, 5, CONVOLUTIONAL),
    Task("text-transformer", 3, 5, steps=500),
)
COSTS = (
    Task("mnist-mlp", 6, 0),
    *(Task("mnist-mlp-512", depth, 0, (STEPS,)) for depth in (3, 6, 10, 20)),
    Task("mnist-mlp-1024", 6, 0),
    Task("fashion-cnn", 3, 0, CONVOLUTIONAL),
    Task("text-transformer", 3, 0),
)


def run() -> None:
    """Train, measure costs, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=Path("data/mnist"))
    parser.add_argument("--fashion", type=Path, default=Path("data/fashion"))
    folders = vars(parser.parse_args())
    for task in TASKS:
        main.main([*task.words(folders)])
    for task in COSTS:
        main.main(["--turns=100", *task.words(folders)])
    report.main(["--write"])


if __name__ == "__main__":
    run()
