"""The tables of the README, made from results.csv and costs.csv; nothing is trained.

python benchmarks/estimators/report.py [--write]

With `--write` they take the place of those in README.md.
"""

import argparse
import re
import statistics
from collections.abc import Iterable, Sequence
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

from records import COSTS, Found, best, matching, rates_of
from rows import NETS, is_learned, kind_of, rows_of
from scipy import stats

README = Path(__file__).with_name("README.md")
GRADIENTS = ("sg_error", "weight_error", "cosine")
Trainings = dict[str, list[Found]]


class Scope(NamedTuple):
    """Which trainings a table is about.

    Attributes:
        net: Its name.
        depth: Its depth.
        rates_of: Depth whose grid chose the rates of rows with estimators to train; its own by default.
        steps: Length of a training.
    """

    net: str
    depth: int
    rates_of: int | None = None
    steps: int = 1000

    def trainings(self, row: str) -> list[Found]:
        """Those of a row with the rates that its grid chose, by seed; nothing where none was chosen."""
        learned = is_learned(rows_of(NETS[self.net])[row])
        depth = self.depth if self.rates_of is None or not learned else self.rates_of
        here = {"net": self.net, "row": row, "steps": str(self.steps)}
        grid = matching({**here, "phase": "grid", "depth": str(depth)})
        if not grid:
            return []
        chosen = rates_of(best(grid))
        tested = matching({**here, **chosen, "phase": "test", "depth": str(self.depth)})
        return sorted(tested, key=lambda found: int(found["seed"]))


def error_table(scope: Scope, rows: Iterable[str] | None = None, against: str = "backprop") -> list[str]:
    """Lines of a table: errors, the differences to the row `against`, and gradients; a line for each row."""
    heading = [
        "",
        "rates: net, estimator",
        "test error, % (seeds)",
        f"minus {against}'s, 95 % interval",
        "SG error",
        "weight error",
        "cosine",
    ]
    cells = []
    others = scope.trainings(against)
    for row in rows_of(NETS[scope.net]) if rows is None else rows:
        own = scope.trainings(row)
        if own:
            rate, estimator_rate = (_rate(own[0], name) for name in ("rate", "estimator_rate"))
            difference = "" if row == against else paired(own, others)
            cells.append([row, f"{rate}, {estimator_rate}", _error(own), difference, *_gradients(own)])
    return _table(heading, cells)


def depth_table(
    scopes: Sequence[Scope], lines: Sequence[str | tuple[str, str]], timed: str | None = None
) -> list[str]:
    """Lines of a table with a column for each scope.

    Args:
        scopes: Those of one net.
        lines: Rows whose test errors are shown, or pairs of them, for the difference.
        timed: A row whose step time over backprop's comes last.
    """
    cells = []
    for line in lines:
        if isinstance(line, str):
            cells.append([line, *(_error(scope.trainings(line)) for scope in scopes)])
        else:
            trainings = [tuple(map(scope.trainings, line)) for scope in scopes]
            cells.append([" minus ".join(line), *starmap(paired, trainings)])
    if timed is not None:
        costs = [_costs(scope.net, scope.depth).get(timed) for scope in scopes]
        times = ["-" if cost is None else f"{float(cost['time']):.2f}" for cost in costs]
        cells.append([f"step time of {timed}, over backprop's", *times])
    first, *others = (scope.depth for scope in scopes)
    return _table(["", f"{first} hidden layers", *map(str, others)], cells)


def cost_table(nets: dict[str, str], depth: int) -> list[str]:
    """Lines of a table: what a step costs.

    Args:
        nets: What to call each net, by its name. All have a column of times, the first all the rest.
        depth: Their depth.
    """
    measured = {name: _costs(name, depth) for name in nets}
    first, *_ = nets
    heading = [
        "",
        *(f"step time, {title}" for title in nets.values()),
        f"peak memory, MB, {nets[first]}",
        "parameters of the estimators",
        "MFLOP per step",
        "learns from the network above",
        "locks",
    ]
    cells = []
    for row, found in measured[first].items():
        times = [f"{float(costs[row]['time']):.2f}" for costs in measured.values()]
        peak, flops = f"{float(found['peak']) / 1e6:.1f}", f"{float(found['flops']) / 1e6:.0f}"
        counts = [peak, f"{int(found['parameters']):,}", flops]
        cells.append([row, *times, *counts, *_facts(first, row)])
    return _table([part.removesuffix(", ") for part in heading], cells)


def paired(own: list[Found], others: list[Found]) -> str:
    """Mean difference of the test errors with equal seeds, and its 95 % interval (Student's t)."""
    known = {found["seed"]: float(found["test_error"]) for found in others}
    pairs = [(float(found["test_error"]), known[found["seed"]]) for found in own if found["seed"] in known]
    differences = [mine - theirs for mine, theirs in pairs]
    if len(differences) < 2:
        return "-"
    mean, error = statistics.fmean(differences), stats.sem(differences)
    if not error:
        return f"{mean:+.2f}"
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=error)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _error(finished: list[Found]) -> str:
    if not finished:
        return "-"
    errors = [float(found["test_error"]) for found in finished]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.fmean(errors):.2f}{spread} ({len(errors)})"


def _rate(found: Found, name: str) -> str:
    return "-" if found[name] == "0" else found[name]


def _gradients(finished: list[Found]) -> list[str]:
    columns = [[found[name] for found in finished] for name in GRADIENTS]
    means = [statistics.fmean(map(float, column)) if all(column) else None for column in columns]
    return ["-" if mean is None else f"{mean:.0f}" if mean >= 1000 else f"{mean:.2f}" for mean in means]


def _costs(net: str, depth: int) -> dict[str, Found]:
    return {found["row"]: found for found in matching({"net": net, "depth": str(depth)}, COSTS)}


def _facts(net: str, row: str) -> tuple[str, str]:
    """Whether it learns from the network above, and what it waits for."""
    factory = rows_of(NETS[net])[row]
    if factory is None:
        return "yes", "all"
    kind, options = kind_of(factory)
    locks = sorted((lock.value for lock in kind.locks_with(**options)), reverse=True)
    return "yes" if kind.needs else "no", ", ".join(locks) or "none"


def _table(heading: list[str], cells: list[list[str]]) -> list[str]:
    rule = "|" + len(heading) * "---|"
    head, *lines = ("| " + " | ".join(line) + " |" for line in [heading, *cells])
    return [head.replace("|  |", "| |", 1), rule, *lines]


def tables() -> list[list[str]]:
    """Those of the README, in their order."""
    depths = [Scope("mnist-mlp", depth, rates_of=6) for depth in (3, 6, 10, 20)]
    ours, local, steps = "critic, label share", "local loss", "critic, label share, 4 steps"
    behind = ["critic", "Sobolev, label share", "cDNI"]
    pairs = [(ours, "backprop"), (local, "backprop"), (ours, local)]
    return [
        error_table(Scope("mnist-mlp", 6)),
        depth_table(depths, ["backprop", ours, pairs[0], local, *pairs[1:], *behind]),
        depth_table(
            [scope._replace(rates_of=None) for scope in depths],
            ["backprop", steps, (steps, "backprop"), local, (local, "backprop"), (steps, local)],
        ),
        depth_table(
            [Scope("mnist-mlp-512", depth, rates_of=6 if depth == 10 else None) for depth in (3, 6, 10, 20)],
            ["backprop", steps, (steps, "backprop")],
            timed=steps,
        ),
        cost_table({"mnist-mlp": "128 units", "mnist-mlp-1024": "1,024 units"}, depth=6),
        error_table(Scope("mnist-mlp-1024", 6)),
        error_table(Scope("fashion-mlp", 6)),
        error_table(Scope("fashion-cnn", 3)),
        depth_table([Scope("fashion-cnn", 3)], [(ours, local)]),
        cost_table({"fashion-cnn": "convolutional"}, depth=3),
        error_table(Scope("text-transformer", 3, steps=500)),
        cost_table({"text-transformer": "transformer"}, depth=3),
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, or put them in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them in the place of those in README.md")
    args = parser.parse_args(words)
    texts = ["\n".join(table) + "\n" for table in tables()]
    if not args.write:
        print("\n".join(texts), end="")
        return
    page = README.read_text()
    old = re.findall(r"^(?:\|.*\n)+", page, re.MULTILINE)
    if len(old) != len(texts):
        raise SystemExit(f"Expected {len(texts)} tables in {README}, but found {len(old)}.")
    for before, after in zip(old, texts, strict=True):
        page = page.replace(before, after)
    README.write_text(page)


if __name__ == "__main__":
    main()
