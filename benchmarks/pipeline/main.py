"""Throughput of pipelines of 2, 4 and 8 processes, side by side, in shares of the ideal.

OMP_NUM_THREADS=1 python benchmarks/pipeline/main.py [--stages 2 4 8] [--milliseconds 150] [--steps 40]

Every stage sleeps for so long per batch, a third of it forward, as a process does whose GPU computes; what
remains on the CPU is what the schedule, the messages, the Trainer and the estimators cost. Ideal: a batch per
stage time. Rows of one number of stages run after one another on the same machine.
"""

import argparse
import csv
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import contenders
import torch
from launch import kept_in, run
from rich.console import Console
from rich.table import Table
from stages import sleep_precisely

HERE = Path(__file__).parent


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: What ran.
        time: What one process calls; given stages, seconds and steps.
        grouped: Whether the process group is made for it.
        bound: Share of the ideal that its schedule allows, by formula.
        alone: Whether it is one process.
    """

    name: str
    time: Callable[[int, float, int], float]
    grouped: bool
    bound: Callable[[int], float]
    alone: bool = False


def bubble(microbatches: int) -> Callable[[int], float]:
    """Share of the ideal under GPipe and 1F1B."""
    return lambda stages: microbatches / (microbatches + stages - 1)


def rows(microbatches: list[int]) -> list[Row]:
    """All contenders."""

    def theirs(schedule: str, m: int) -> Row:
        time = partial(contenders.torch_pipeline, schedule=schedule, microbatches=m)
        return Row(f"torch {schedule}, {m} microbatches", time, True, bubble(m))

    def ours(staleness: int) -> Row:
        bound = 0.75 if staleness == 0 else 1.0  # waits for the forward pass of the stage above
        time = partial(contenders.dni, staleness=staleness)
        return Row(f"DNI, staleness {staleness}", time, False, lambda _: bound)

    return [
        Row("one process, backprop", contenders.one_process, False, lambda stages: 1 / stages, alone=True),
        *(theirs("GPipe", m) for m in microbatches),
        *(theirs("1F1B", m) for m in microbatches),
        Row(
            "1f1b of DNIPipelineStrategy, 8 microbatches",
            partial(contenders.exact, schedule="1f1b", microbatches=8),
            False,
            bubble(8),
        ),
        *map(ours, (0, 1, 2)),
        Row(
            "the same work without messages",
            partial(contenders.without_messages, staleness=2),
            True,
            lambda _: 1.0,
        ),
    ]


def measure(row: Row, stages: int, seconds: float, steps: int) -> float:
    """Seconds per step, of the slowest process."""
    processes = 1 if row.alone else stages
    steps = max(6, steps // stages) if row.alone else steps

    def process() -> float:
        sleep_precisely()
        return row.time(stages, seconds, steps)

    return max(run(process, processes, row.grouped))


def show(found: list[tuple[str, int, float, float]], seconds: float, path: Path | None) -> None:
    """Print the table and write the numbers, if there is a place for them."""
    sizes = sorted({stages for _, stages, _, _ in found})
    table = Table(
        title=f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo, "
        f"{seconds * 1e3:.0f} ms per stage: share of the ideal in % (bound of the schedule)"
    )
    table.add_column("")
    for stages in sizes:
        table.add_column(f"{stages} stages")
    for name in dict.fromkeys(n for n, *_ in found):
        cells = {s: f"{100 * seconds / t:.1f} ({100 * b:.0f})" for n, s, t, b in found if n == name}
        table.add_row(name, *(cells.get(stages, "-") for stages in sizes))
    Console(width=110).print(table)
    if path is None:
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contender", "stages", "seconds per step", "bound"])
        writer.writerows(found)


def main() -> None:
    """Run every contender at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--milliseconds", type=float, default=150.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--only", nargs="+", default=[""], help="run those whose name contains any of these")
    parser.add_argument("--csv", type=Path, default=None, help="results.csv for the whole run, else none")
    args = parser.parse_args()
    path = kept_in(HERE / "results.csv", parser, args, "steps")
    seconds = args.milliseconds / 1e3
    found = []
    for stages in args.stages:
        for row in rows(args.microbatches):
            if any(word in row.name for word in args.only):
                time = measure(row, stages, seconds, args.steps)
                Console().print(f"{stages} stages, {row.name}: {time * 1e3:.1f} ms per step")
                found.append((row.name, stages, time, row.bound(stages)))
    show(found, seconds, path)


if __name__ == "__main__":
    main()
