"""The estimators as error approximators in one table, read off their classes (Czarnecki et al. 2017, section 6)."""

import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dni import estimators
from lightning_dni.core.estimator import GradientEstimator, Lock, Signal

HEADINGS = (
    "estimator",
    "gradient given to h",
    "s(h, y)",
    "s learns",
    "target t",
    "loss L(t, s)",
    "update locked",
    "backward locked",
    "direct error",
)
PROP = "prop_alpha"


def catalog() -> list[tuple[str, ...]]:
    """The rows under `HEADINGS`: what predicts the gradient first, then what waits longest first."""
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
        f"{kind.__name__}({PROP}=a)" if options else kind.__name__,
        f"{facts.gradient} + a dL/dh" if options else facts.gradient,
        facts.synthesis,
        "no" if kind.loss is GradientEstimator.loss else "yes",
        facts.target,
        facts.loss,
        "yes" if Lock.UPDATE in locks else "no",
        "yes" if Lock.BACKWARD in locks else "no",
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


def print_catalog() -> None:
    """Print the table."""
    table = Table(
        title="Error approximators", caption="Every stage runs after the one below: forward locked."
    )
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in catalog():
        table.add_row(*row)
    Console().print(table)
