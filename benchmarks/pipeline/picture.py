"""Draw how throughput grows with the stages: what main.py has measured, and simulate.py's schedule beyond it.

python benchmarks/pipeline/picture.py [--csv results.csv] [--out throughput.png]
"""

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from simulate import dni, exact

HERE = Path(__file__).parent
MEASURED, SIMULATED = (2, 4, 8), (2, 4, 8, 16, 32, 64)
Schedule = Callable[[int, float, float], float]
LINES: dict[str, Schedule] = {
    "DNI, staleness 2": partial(dni, staleness=2),
    "DNI, staleness 0": partial(dni, staleness=0),
    "torch 1F1B, 8 microbatches": partial(exact, microbatches=8, in_flight=True),
    "torch 1F1B, 32 microbatches": partial(exact, microbatches=32, in_flight=True),
}


def main() -> None:
    """Read, simulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results.csv")
    parser.add_argument("--milliseconds", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=HERE / "throughput.png")
    args = parser.parse_args()
    with args.csv.open() as file:
        seconds = {
            (row["contender"], int(row["stages"])): float(row["seconds per step"])
            for row in csv.DictReader(file)
        }
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=110, layout="constrained")
    for index, (name, schedule) in enumerate(LINES.items()):
        # batches per stage time, times the stages: how many times as fast as one process
        paper = [stages * schedule(stages, 0.0, 0.0) for stages in SIMULATED]
        axes.plot(SIMULATED, paper, "--", color=f"C{index}", linewidth=1)
        speed = [n * args.milliseconds / 1e3 / seconds[name, n] for n in MEASURED]
        axes.plot(MEASURED, speed, "o", color=f"C{index}", label=name)
    axes.set(xlabel="stages, one process each", ylabel="batches per second, one process = 1")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.plot([], [], "--", color="grey", linewidth=1, label="on paper, no overhead")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Throughput of pipelines (speed, not learning)", fontsize=11)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
