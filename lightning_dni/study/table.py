"""The results of a study: a row per run, and a row per cell of the grid with mean and spread over seeds."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_dni.errors import StudyError
from lightning_dni.study.configuration import Cell, Run, Study
from lightning_dni.study.folder import Result

COLUMNS = ("seed", "seeds", "status", "failed", "failure")


@dataclass
class CellResults:
    """What the seeds of one cell gave."""

    cell: Cell
    finished: list[tuple[Run, Result]] = field(default_factory=list)
    planned: int = 0
    errors: list[str] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Of the runs that have logged it."""
        return [result.metrics[metric] for _, result in self.finished if metric in result.metrics]


def check_metrics(metrics: Iterable[str], study: Study) -> None:
    """Whether metrics have names of their own in the table.

    Raises:
        StudyError: One is called as an axis or another column.
    """
    for name in metrics:
        if name in (*COLUMNS, *study.axes):
            raise StudyError(
                f"Expected metrics with names of their own, but got {name!r}, which is a column of the "
                f"table: {', '.join((*study.axes, *COLUMNS))}. Rename the metric or the axis."
            )


def spread_of(metric: str, metrics: Iterable[str]) -> str:
    """The column of a metric's standard deviation, which is not that of another metric.

    >>> spread_of("loss", ["loss", "error"]), spread_of("loss", ["loss", "loss_std"])
    ('loss_std', 'loss_std_over_seeds')
    """
    name = f"{metric}_std"
    return f"{name}_over_seeds" if name in metrics else name


def by_cell(study: Study, results: Mapping[str, Result]) -> list[CellResults]:
    """The results of the seeds together, in the order of the grid."""
    cells: dict[tuple[str, ...], CellResults] = {}
    for run in study.runs:
        found = cells.setdefault(tuple(run.cell.values()), CellResults(run.cell))
        found.planned += 1
        result = results.get(run.name)
        if result is not None and result.error is None:
            found.finished.append((run, result))
        elif result is not None:
            found.errors.append(str(result.error))
    return list(cells.values())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; not a number for a single value)."""
    try:
        mean = statistics.fmean(values)
        finite = len(values) > 1 and all(map(math.isfinite, values))
        return mean, statistics.stdev(values) if finite else math.nan
    except (ValueError, OverflowError):  # both infinities, or more than a number can hold
        return math.nan, math.nan


def metrics_of(study: Study, results: Mapping[str, Result]) -> list[str]:
    """All metrics of all runs, those of the table first."""
    names = dict.fromkeys(study.table)
    for result in results.values():
        names.update(dict.fromkeys(result.metrics))
    return list(names)


def write_runs(study: Study, results: Mapping[str, Result], file: Path) -> None:
    """One row per run: where it is in the grid, how it ended, all its metrics."""
    metrics = metrics_of(study, results)
    rows = []
    for run in study.runs:
        result = results.get(run.name)
        status = "missing" if result is None else "failed" if result.error else "finished"
        found = result.metrics if result else {}
        failure = result.error if result else None
        rows.append({**run.cell, "seed": run.seed, "status": status, **found, "failure": failure})
    _write(file, [*study.axes, "seed", "status", *metrics, "failure"], rows)


def write_results(study: Study, results: Mapping[str, Result], file: Path) -> None:
    """One row per cell: mean and standard deviation of every metric over its seeds."""
    metrics = metrics_of(study, results)
    rows = []
    for found in by_cell(study, results):
        row: dict[str, Any] = {**found.cell, "seeds": len(found.finished), "failed": len(found.errors)}
        for metric in metrics:
            values = found.values(metric)
            if values:
                row[metric], row[spread_of(metric, metrics)] = mean_and_spread(values)
        row["failure"] = "; ".join(dict.fromkeys(found.errors))
        rows.append(row)
    columns = [name for metric in metrics for name in (metric, spread_of(metric, metrics))]
    _write(file, [*study.axes, "seeds", "failed", *columns, "failure"], rows)


def _write(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def printed_table(study: Study, results: Mapping[str, Result]) -> Table:
    """The table for a terminal: `mean ± standard deviation` of the metrics that the YAML names."""
    title = f"{study.name}: {study.recipe['claim']}" if "claim" in study.recipe else study.name
    table = Table(title=escape(title))
    metrics = study.table or tuple(metrics_of(study, results))
    for axis in study.axes:
        table.add_column(escape(axis), no_wrap=True)
    for heading in (*metrics, "seeds"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for found in by_cell(study, results):
        numbers = [_shown(found.values(metric)) for metric in metrics]
        table.add_row(*map(escape, found.cell.values()), *numbers, _seeds(found))
    return table


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.4g}" if math.isnan(spread) else f"{mean:.4g} ± {spread:.2g}"


def _seeds(found: CellResults) -> str:
    counted = str(len(found.finished))
    if len(found.finished) < found.planned:
        counted += f" of {found.planned}"
    return f"{counted}, {len(found.errors)} failed" if found.errors else counted
