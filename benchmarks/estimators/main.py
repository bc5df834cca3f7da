"""Every estimator on one net: errors over paired seeds, gradients, step time, memory and operations.

OMP_NUM_THREADS=1 python benchmarks/estimators/main.py [--net mnist-mlp] [--depth 6] [--data-dir data/mnist]

Each row takes the learning rates with the lowest validation error of a training with seed 0 (`--rates-of 6`:
rows with estimators to train take those chosen at that depth); then it is trained with them and seeds 1, 2,
..., and the test set is read.
Finished trainings are in results.csv beside this file and are not repeated. With `--turns 100` nothing is
trained: steps of all rows take turns, four at a time, and what they cost goes to costs.csv.
"""

import argparse
import csv
import itertools
import logging
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from measure import Cost, Setting, costs, train
from rich import box
from rich.console import Console
from rich.table import Table
from rows import NETS, Net, is_learned, kind_of, rows_of
from scipy import stats

from lightning_dni.core import EstimatorFactory

RESULTS, COSTS = (Path(__file__).with_name(name) for name in ("results.csv", "costs.csv"))
RATES, ESTIMATOR_RATES = (1e-3, 3e-3), (1e-3, 1e-2, 3e-2)
GRID_SEED = 0
FIGURES = ("val_error", "test_error", "sg_error", "weight_error", "cosine", "seconds")
FIELDS = ("net", "depth", "row", "phase", "steps", "seed", "rate", "estimator_rate", *FIGURES)
Found = dict[str, str]


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
        pairs = itertools.product(RATES, estimator_rates)
        return [Setting(depth, *pair, self.steps, GRID_SEED) for pair in pairs]


def read(path: Path = RESULTS) -> list[Found]:
    """What was measured so far."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def look_up(key: Found) -> Found | None:
    """The training of that key, if it has finished."""
    return next((found for found in read() if key.items() <= found.items()), None)


def measure(task: Task, row: str, phase: str, setting: Setting) -> Found:
    """The training of that setting, now or earlier."""
    key = task.key(row, phase, setting)
    found = look_up(key)
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
    """The rates with the lowest validation error; of equal ones those tried first."""
    settings = task.settings(row, depth)
    errors = [float(measure(task, row, "grid", setting)["val_error"]) for setting in settings]
    return settings[errors.index(min(errors))]


def run(task: Task, seeds: int, rates_of: int) -> dict[str, list[Found]]:
    """The trainings of all rows, of which those that are missing are run, one seed after another."""
    learned = {row: is_learned(factory) for row, factory in task.rows.items()}
    best = {row: best_setting(task, row, rates_of if learned[row] else task.depth) for row in task.rows}
    finished: dict[str, list[Found]] = {row: [] for row in task.rows}
    for seed in range(1, seeds + 1):
        for row, setting in best.items():
            found = measure(task, row, "test", setting._replace(depth=task.depth, seed=seed))
            finished[row].append(found)
    return finished


def measure_costs(task: Task, turns: int) -> None:
    """Measure what a step costs, in place of what costs.csv says of this net and depth."""
    others = [
        found for found in read(COSTS) if (found["net"], found["depth"]) != (task.name, str(task.depth))
    ]
    found = costs(task.net, task.rows, task.depth, task.data, turns)
    with COSTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("net", "depth", "row", *Cost._fields))
        writer.writeheader()
        writer.writerows(others)
        for row, cost in found.items():
            figures = {name: f"{value:.10g}" for name, value in cost._asdict().items()}
            writer.writerow({"net": task.name, "depth": task.depth, "row": row, **figures})


def paired(own: list[Found], others: list[Found]) -> str:
    """Mean difference of the test errors with equal seeds, and its 95 % interval (Student's t)."""
    pairs = zip(own, others, strict=False)
    differences = [float(a["test_error"]) - float(b["test_error"]) for a, b in pairs]
    if len(differences) < 2:
        return "-"
    mean, error = statistics.fmean(differences), stats.sem(differences)
    if not error:
        return f"{mean:+.2f}"
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=error)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def show_errors(finished: dict[str, list[Found]], against: str) -> None:
    """Print errors and gradients, with means over seeds, and the difference to the row `against`."""
    headings = ("", "rates", "test error, %", f"minus {against}", "SG error", "weight error", "cosine")
    table = Table(*headings, box=box.MARKDOWN)
    for row, own in finished.items():
        errors = [float(found["test_error"]) for found in own]
        if not errors:
            continue
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        rates = " ".join(own[0][name] for name in ("rate", "estimator_rate") if own[0][name] != "0")
        difference = "-" if row == against else paired(own, finished.get(against, []))
        table.add_row(row, rates, f"{statistics.fmean(errors):.2f}{spread}", difference, *_gradients(own))
    Console(width=160).print(table)


def _gradients(finished: list[Found]) -> list[str]:
    columns = [[found.get(name) for found in finished] for name in ("sg_error", "weight_error", "cosine")]
    return [f"{statistics.fmean(map(float, column)):.2f}" if all(column) else "-" for column in columns]


def show_costs(task: Task) -> None:
    """Print costs, and what each row waits for and learns from."""
    scope = {"net": task.name, "depth": str(task.depth)}
    measured = {found["row"]: found for found in read(COSTS) if scope.items() <= found.items()}
    headings = (
        "",
        "locked",
        "learns from the network above",
        "step time / backprop's",
        "operations / backprop's",
        "peak memory, MB",
        "estimator parameters",
    )
    table = Table(*headings, box=box.MARKDOWN)
    whole = int(measured["backprop"]["flops"])
    for row, found in measured.items():
        ratio = f"{float(found['time']):.2f} ({float(found['low']):.2f} to {float(found['high']):.2f})"
        operations, memory = int(found["flops"]) / whole, int(found["peak"]) / 1e6
        cells = (ratio, f"{operations:.2f}", f"{memory:.1f}", f"{int(found['parameters']):,}")
        table.add_row(row, *_facts(task.rows[row]), *cells)
    Console(width=160).print(table)


def _facts(factory: EstimatorFactory | None) -> tuple[str, str]:
    if factory is None:
        return "update, backward", "(is the network)"
    kind, options = kind_of(factory)
    locks = sorted((lock.value for lock in kind.locks_with(**options)), reverse=True)
    return ", ".join(locks) or "-", "yes" if kind.needs else "no"


def main() -> None:
    """Run what is missing, then print the tables."""
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    net = NETS[args.net]
    rows = {row: factory for row, factory in rows_of(net).items() if args.rows is None or row in args.rows}
    task = Task(args.net, net, args.depth, args.steps, rows, net.data(args.data_dir))
    if args.turns:
        measure_costs(task, args.turns)
        show_costs(task)
    else:
        show_errors(run(task, args.seeds, args.rates_of or args.depth), args.against)


if __name__ == "__main__":
    main()
