"""Every estimator on one net: errors over paired seeds, gradients, step time, memory and operations.

OMP_NUM_THREADS=1 python benchmarks/estimators/main.py [--net mnist-mlp] [--depth 6] [--data-dir data/mnist]

Each row takes the learning rates with the lowest validation error of a training with seed 0 (`--rates-of 6`:
rows with estimators to train take those chosen at that depth); then it is trained with them and seeds 1, 2,
..., and the test set is read.
Finished trainings are in results.csv beside this file and are not repeated. With `--turns 100` nothing is
trained: steps of all rows take turns, four at a time, and what they cost goes to costs.csv. The tables of the
README are made from both by report.py.
"""

import argparse
import csv
import itertools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from measure import Cost, Setting, costs, train
from records import COSTS, RESULTS, Found, best, matching, read
from report import Scope, cost_table, error_table
from rows import ESTIMATOR_STEPS, NETS, Net, is_learned, rows_of

from lightning_dni.core import EstimatorFactory

ESTIMATOR_RATES = (1e-3, 1e-2, 3e-2)
GRID_SEED = 0
FIGURES = ("val_error", "test_error", "sg_error", "weight_error", "cosine", "seconds")
FIELDS = ("net", "depth", "row", "phase", "steps", "seed", "rate", "estimator_rate", *FIGURES)


class Task(NamedTuple):
    """What one call of this script is about.

    Attributes:
        name: Of the net.
        net: The net.
        depth: Its depth.
        steps: Length of a training.
        rows: What is compared.
        data: The data, loaded once.
    """

    name: str
    net: Net
    depth: int
    steps: int
    rows: dict[str, EstimatorFactory | None]
    data: LightningDataModule

    def key(self, row: str, phase: str, setting: Setting) -> Found:
        """What tells a training from all others, as it is written."""
        rates = {"rate": f"{setting.rate:g}", "estimator_rate": f"{setting.estimator_rate:g}"}
        run = {"row": row, "phase": phase, "steps": str(setting.steps), "seed": str(setting.seed)}
        return {"net": self.name, "depth": str(setting.depth), **run, **rates}

    def settings(self, row: str, depth: int) -> list[Setting]:
        """The grid; what has no estimator to train has one rate less."""
        estimator_rates = ESTIMATOR_RATES if is_learned(self.rows[row]) else (0.0,)
        pairs = itertools.product(self.net.rates, estimator_rates)
        estimator_steps = ESTIMATOR_STEPS.get(row, 1)
        return [Setting(depth, *pair, self.steps, GRID_SEED, estimator_steps) for pair in pairs]


def measure(task: Task, row: str, phase: str, setting: Setting) -> Found:
    """The training of that setting, now or earlier."""
    key = task.key(row, phase, setting)
    found = next(iter(matching(key)), None)
    if found is None:
        figures = train(task.net, task.rows[row], setting, task.data, final=phase == "test")
        found = key | {name: f"{figures[name]:.4g}" for name in FIGURES if name in figures}
        fresh = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerow(found)
        print(" ".join(v for v in found.values() if v), flush=True)
    return found


def best_setting(task: Task, row: str, depth: int) -> Setting:
    """The rates with the lowest validation error; of equal ones the lowest."""
    chosen = best([measure(task, row, "grid", setting) for setting in task.settings(row, depth)])
    settings = task.settings(row, depth)
    rates = float(chosen["rate"]), float(chosen["estimator_rate"])
    return next(setting for setting in settings if (setting.rate, setting.estimator_rate) == rates)


def run(task: Task, seeds: int, rates_of: int) -> None:
    """Run the trainings of all rows that are missing, one seed after another."""
    learned = {row: is_learned(factory) for row, factory in task.rows.items()}
    chosen = {row: best_setting(task, row, rates_of if learned[row] else task.depth) for row in task.rows}
    for seed in range(1, seeds + 1):
        for row, setting in chosen.items():
            measure(task, row, "test", setting._replace(depth=task.depth, seed=seed))


def measure_costs(task: Task, turns: int) -> None:
    """Measure what a step costs, in place of what costs.csv says of these rows of this net and depth."""
    measured = {(task.name, str(task.depth), row) for row in task.rows}
    others = [found for found in read(COSTS) if (found["net"], found["depth"], found["row"]) not in measured]
    found = costs(task.net, task.rows, task.depth, task.data, turns)
    with COSTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("net", "depth", "row", *Cost._fields))
        writer.writeheader()
        writer.writerows(others)
        for row, cost in found.items():
            figures = {name: f"{value:.10g}" for name, value in cost._asdict().items()}
            writer.writerow({"net": task.name, "depth": task.depth, "row": row, **figures})


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="mnist-mlp")
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates-of", type=int, default=None, help="depth whose grid is asked")
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--against", default="backprop", help="row from which differences are taken")
    parser.add_argument("--turns", type=int, default=0, help="train nothing, measure the costs of a step")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    net = NETS[args.net]
    rows = {row: factory for row, factory in rows_of(net).items() if args.rows is None or row in args.rows}
    task = Task(args.net, net, args.depth, args.steps, rows, net.data(args.data_dir))
    if args.turns:
        measure_costs(task, args.turns)
        print("\n".join(cost_table({args.net: args.net}, args.depth)))
    else:
        run(task, args.seeds, args.rates_of or args.depth)
        scope = Scope(args.net, args.depth, args.rates_of, args.steps)
        print("\n".join(error_table(scope, rows, args.against)))


if __name__ == "__main__":
    main()
