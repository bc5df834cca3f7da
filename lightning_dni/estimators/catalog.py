"""The estimators as error approximators in one table (Czarnecki et al. 2017, section 6)."""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_dni import estimators
from lightning_dni.core.estimator import GradientEstimator, Lock, Signal

HEADINGS = (
    "estimator",
    "given to h",
    "s(h, y)",
    "s learns",
    "target t",
    "loss l(t, s)",
    "locks",
    "direct error",
)
PROP = "prop_alpha"


def catalog() -> list[tuple[str, ...]]:
    """The rows under `HEADINGS`: what predicts the gradient first, then what waits longest first.

    A stage runs after the one below under any of them, so all have the forward lock; only synthetic inputs
    lift it, whatever the gradients are.
    """
    kinds = [getattr(estimators, name) for name in estimators.__all__]
    listed: list[tuple[type[GradientEstimator], dict[str, Any]]] = [(kind, {}) for kind in kinds]
    listed += [(kind, {PROP: 1.0}) for kind in kinds if PROP in inspect.signature(kind).parameters]
    return [_row(*entry) for entry in sorted(listed, key=_place)]


def _place(entry: tuple[type[GradientEstimator], dict[str, Any]]) -> tuple[object, ...]:
    kind, options = entry
    return not kind.regresses, bool(options), -len(kind.locks), kind.__name__


def _row(kind: type[GradientEstimator], options: dict[str, Any]) -> tuple[str, ...]:
    facts, locks = kind.facts, kind.locks_with(**options)
    assert facts is not None, f"{kind.__name__} has no `facts`"
    return (
        f"{kind.__name__}, {PROP}=a" if options else kind.__name__,
        f"{facts.gradient} + a dl/dh" if options else facts.gradient,
        facts.synthesis,
        "no" if kind.loss is GradientEstimator.loss else "yes",
        facts.target,
        facts.loss,
        ", ".join(lock.value for lock in Lock if lock in locks | {Lock.FORWARD}),
        _direct_error(kind),
    )


def _direct_error(kind: type[GradientEstimator]) -> str:
    """What reaches the estimator straight from the end of the network."""
    if Signal.OUTPUT_GRADIENT in kind.needs:
        return "yes"
    found = ["output"] if Signal.OUTPUT in kind.needs else []
    classes = inspect.signature(kind).parameters.get("num_classes")
    if classes is not None and classes.default is inspect.Parameter.empty:
        found.append("label")
    return f"yes ({', '.join(found)})" if found else "no"


def markdown() -> str:
    """The table for documentation."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *catalog()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(words: Sequence[str]) -> int:
    """Run `lightning-dni estimators`: print the table; any `words` get its usage.

    Returns:
        The exit code.
    """
    if words:
        sys.stdout.write("usage: lightning-dni estimators\n\nPrints what each estimator learns from what.\n")
        return 0 if words[0] in ("-h", "--help") else 2
    title = "Error approximators; the classes' names end in Estimator"
    rows = [(row[0].replace("Estimator", ""), *row[1:]) for row in catalog()]
    table = Table(title=title)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", no_wrap=heading == HEADINGS[0])
    for row in rows:
        table.add_row(*row)
    console = Console()
    readable = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.print(table if console.width >= readable else _one_below_the_other(title, rows))
    return 0


def _one_below_the_other(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    """A table that is read in a narrow terminal: a line for each cell."""
    table = Table("", "", "", title=title, show_header=False)
    for name, *cells in rows:
        for heading, cell in zip(HEADINGS[1:], cells, strict=True):
            table.add_row(name if heading == HEADINGS[1] else "", heading, cell)
        table.add_section()
    return table
