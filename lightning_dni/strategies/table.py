"""The table of stages that `strategy.describe()` prints."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from lightning_dni.core.boundary import choose_by_pattern, resolve_boundaries
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.strategies.options import DNIOptions


def describe(module: pl.LightningModule, options: DNIOptions) -> None:
    """Print stages, parameters, estimators and what is locked.

    A stage is counted as the parameters registered after the boundary below and up to its own, which
    is the forward order of most modules; training itself follows autograd's graph.
    """
    table = Table(title=f"{type(module).__name__} under synthetic gradients")
    for heading in ("stage below", "parameters", "estimator", "learns from the network above", "waits for"):
        table.add_column(heading)
    for row in stages(module, options):
        table.add_row(*row)
    Console().print(table)


def stages(module: pl.LightningModule, options: DNIOptions) -> list[tuple[str, ...]]:
    """The rows of the table, the last stage at the end."""
    counts = {id(p): p.numel() for p in module.parameters() if p.requires_grad}
    rows: list[tuple[str, ...]] = []
    boundaries = resolve_boundaries(module, options.boundaries)
    for name, submodule in boundaries.items():
        last = [id(p) for p in submodule.parameters() if id(p) in counts][-1:]
        size = _take_up_to(counts, last[0]) if last else 0
        factory = choose_by_pattern(name, options.estimator, "estimator")
        bp_lambda = float(choose_by_pattern(name, options.bp_lambda, "bp_lambda"))
        rows.append((name, f"{size:,}", *_facts(factory, bp_lambda)))
    rows.append(("(last stage)", f"{sum(counts.values()):,}", "the loss itself", "yes", "nothing"))
    return rows


def _take_up_to(counts: dict[int, int], last: int) -> int:
    taken = 0
    for key in list(counts):
        taken += counts.pop(key)
        if key == last:
            break
    return taken


def _facts(factory: Any, bp_lambda: float) -> tuple[str, str, str]:
    made = factory.func if isinstance(factory, partial) else factory
    if not (isinstance(made, type) and issubclass(made, GradientEstimator)):
        return (getattr(made, "__name__", type(made).__name__), "known on the first batch", "")
    locks = sorted(lock.value for lock in made.locks)
    waits = "the loss (bp_lambda > 0)" if bp_lambda > 0 else ", ".join(locks) or "nothing"
    return made.__name__, "yes" if made.needs else "no", waits
