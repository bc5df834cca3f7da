"""The tables of the README, made from results.csv; nothing is timed.

python benchmarks/step_time/report.py [--write]

With `--write` they take the place of those in README.md.
"""

import argparse
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.csv", "README.md"))
AIMS = {
    "engine / the same loop written by hand": "at most 1.10",
    "engine / backprop": "at most 2.1",
    "engine with `FeedbackAlignmentEstimator` / backprop": "at most 1.25",
    "engine with `DirectFeedbackAlignmentEstimator` / backprop": "at most 1.25",
    "what the Trainer adds: with `DNIStrategy` / plain": "at most 1.1",
}


class Figure(NamedTuple):
    """A number of a table.

    Attributes:
        processes: How many processes took the step.
        row: What was timed, or which two were divided.
        width: Units of a hidden layer.
        value: Median over turns: milliseconds of a step, or a ratio.
        low: 10 % of the turns are below; of several processes the lowest.
        high: 10 % of the turns are above; of several processes the highest.
    """

    processes: int
    row: str
    width: int
    value: float
    low: float
    high: float


def read() -> Iterator[Figure]:
    """What was measured so far."""
    with RESULTS.open() as file:
        for processes, row, width, *values in csv.reader(file):
            if row != "row":
                yield Figure(int(processes), row, int(width), *map(float, values))


def keep(found: Sequence[Figure]) -> None:
    """Write figures, in place of those of as many processes and these widths, and the tables."""
    about = {(each.processes, each.width) for each in found}
    others = (
        [each for each in read() if (each.processes, each.width) not in about] if RESULTS.exists() else []
    )
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Figure._fields)
        writer.writerows(sorted([*others, *found], key=lambda each: (each.processes, each.width)))
    write()


def table(figures: Iterable[Figure]) -> list[str]:
    """Lines of a table: a line for each row, a column for each width."""
    cells: dict[str, list[str]] = {}
    widths: dict[int, None] = {}
    for each in figures:
        spread = f" ({each.low:.2f} to {each.high:.2f})" if each.processes > 1 else ""
        cells.setdefault(each.row, []).append(f"{each.value:.2f}{spread}")
        widths[each.width] = None
    lines = [[row, *values, AIMS.get(row, "")] for row, values in cells.items()]
    heading = ["median over turns", *(f"{width:,} units" for width in widths), "aim"]
    if not any(aim for *_, aim in lines):
        heading, lines = heading[:-1], [line[:-1] for line in lines]
    head, *body = (f"| {' | '.join(line)} |" for line in [heading, *lines])
    return [head, "|" + "---|" * len(heading), *body]


def tables() -> list[str]:
    """That of one process, then that of two."""
    figures = list(read())
    return ["\n".join(table(each for each in figures if each.processes == n)) + "\n" for n in (1, 2)]


def write() -> None:
    """Put the tables into README.md."""
    page, made = README.read_text(), tables()
    for before, after in zip(re.findall(r"^(?:\|.*\n)+", page, re.MULTILINE), made, strict=True):
        page = page.replace(before, after)
    README.write_text(page)


def main() -> None:
    """Print the tables, or put them in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them in the place of those in README.md")
    if parser.parse_args().write:
        write()
    else:
        print("\n".join(tables()), end="")


if __name__ == "__main__":
    main()
