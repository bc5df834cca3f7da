"""The table of stages that `strategy.describe()` prints."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_dni.core.boundary import (
    LAST_STAGE,
    choose_by_pattern,
    modules_by_stage,
    named_submodules,
    resolve_boundaries,
)
from lightning_dni.core.carry import resolve_truncations
from lightning_dni.core.pool import locks_made_by, made_by
from lightning_dni.pipeline.exact import no_estimator
from lightning_dni.strategies.options import DNIOptions


def describe(module: pl.LightningModule, options: DNIOptions) -> None:
    """Print stages, parameters, estimators and what is locked.

    A stage is counted as the parameters registered after the boundary below and up to its own, which
    is the forward order of most modules; training itself follows autograd's graph.
    """
    kind = "exact" if options.estimator is no_estimator else "synthetic"
    table = Table(title=f"{type(module).__name__} under {kind} gradients")
    for heading in ("stage below", "parameters", "estimator", "learns from the network above", "waits for"):
        table.add_column(heading)
    for row in stages(module, options):
        table.add_row(*row)
    Console().print(table)


def stages(module: pl.LightningModule, options: DNIOptions) -> list[tuple[str, ...]]:
    """The rows of the table, the last stage at the end."""
    truncated = resolve_truncations(module, options.truncations)
    given = options.boundaries or not truncated
    boundaries = resolve_boundaries(module, options.boundaries) if given else {}
    sizes: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for stage, found in modules_by_stage(module, boundaries).items():
        own = {p for m in found for p in m.parameters(recurse=False) if p.requires_grad} - seen
        sizes[stage] = sum(p.numel() for p in own)
        seen |= own
    rows: list[tuple[str, ...]] = []
    for name in list(sizes)[:-1]:
        factory = choose_by_pattern(name, options.estimator, "estimator")
        bp_lambda = float(choose_by_pattern(name, options.bp_lambda, "bp_lambda"))
        rows.append((name, f"{sizes[name]:,}", *_facts(factory, bp_lambda)))
    for name in truncated:
        size = sum(p.numel() for p in named_submodules(module)[name].parameters() if p.requires_grad)
        factory = choose_by_pattern(name, options.estimator, "estimator")
        rows.append((f"end of a chunk of {name}", f"{size:,}", *_facts(factory, 0.0)))
    return [*rows, (LAST_STAGE, f"{sizes[LAST_STAGE]:,}", "the loss itself", "yes", "nothing")]


def _facts(factory: Any, bp_lambda: float) -> tuple[str, str, str]:
    called = factory.func if isinstance(factory, partial) else factory
    if called is no_estimator:
        return "none (exact)", "", "the loss"
    made = made_by(factory)
    if made is None:
        return getattr(called, "__name__", type(called).__name__), "known on the first batch", ""
    locks = sorted(lock.value for lock in locks_made_by(factory))
    waits = "the loss (bp_lambda > 0)" if bp_lambda > 0 else ", ".join(locks) or "nothing"
    return made.__name__, "yes" if made.needs else "no", waits
