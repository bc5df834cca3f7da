"""What the synthetic gradients of a fit were worth, boundary by boundary, and what to try."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import cast

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_dni.callbacks.engine import key_of
from lightning_dni.core.report import Observable

FIGURES = {
    "cosine": "dni_true_gradient_cosine",
    "error": "dni_sg_error",
    "norm": "dni_norm_ratio",
    "target error": "dni_target_error",
}
"""Columns and the metrics that they show."""

WEIGHT_ERROR = "dni_weight_error"


def summarizes(engine: Observable) -> bool:
    """Whether there are synthetic gradients to tell of."""
    return bool(lambdas_of(engine))


def summary_of(recent: Mapping[str, Sequence[float]], engine: Observable) -> Group:
    """A table with means over the last measured steps, and a line for each boundary where something may help.

    "norm" is that of the synthetic over that of the true gradient. "descends" counts the steps that are
    certain to, to first order: where the gradient that a stage's weights were given differs from the true one
    by less than the true one's norm. Where it does not, the step may yet do so.

    Args:
        recent: The last values of each metric, by key.
        engine: Says what its estimators are.
    """
    facts = engine.describe()
    kinds, learns = cast(_ByName, facts["estimators"]), cast(_ByName, facts["learns_from_network"])
    table = Table(title="Synthetic gradients at the end of fit, against the true ones")
    for heading in ("boundary", "estimator", *FIGURES, "descends"):
        table.add_column(heading, overflow="fold")
    lines = []
    for name, value in lambdas_of(engine).items():
        figures = {metric: _mean(recent.get(key_of(metric, name), ())) for metric in _READ}
        shown = [_number(figures[metric]) for metric in FIGURES.values()]
        errors = recent.get(key_of(WEIGHT_ERROR, name), ())
        certain = f"{sum(error < 1 for error in errors)} of {len(errors)}" if errors else "-"
        kind = str(kinds.get(name, "")).removesuffix("Estimator")
        table.add_row(name, kind, *shown, certain)
        advice = _advice(figures, value, bool(learns.get(name, True)))
        if advice:
            lines.append(Text(f"{name}: {advice}"))
    return Group(table, *lines)


def advise(figures: Mapping[str, float | None]) -> str:
    """What to try at a boundary whose synthetic gradients measure so; nothing where they are good.

    A relative error of 1 is that of no gradient at all. Estimators that learn from labels alone are not
    meant to follow the true gradient, so the table gives no advice there.

    Args:
        figures: Means by metric; None for what was not measured.
    """
    error, ratio = figures["dni_sg_error"], figures["dni_norm_ratio"]
    if error is None or ratio is None:
        target = figures["dni_target_error"]
        worse = target is not None and not target < 1
        return "worse than no gradient, against the target: see docs/choosing.md" if worse else ""
    cosine, bootstrap = figures["dni_true_gradient_cosine"] or 0.0, figures["dni_bootstrap_error"] or 0.0
    if error < 0.9:
        return _of_small_error(error, figures)
    if ratio == 0:
        return "no gradient: nothing below learns"
    if not ratio <= 1.5:  # also where it is no number
        return "too large: a lower rate for estimator_optimizer, or for the network"
    if ratio < 0.3:
        return "too small: a higher rate for estimator_optimizer, or estimator_steps=2"
    if bootstrap >= 0.9:
        return "its target is wrong itself: mend the boundary above first, or let labels have a share"
    if cosine <= 0.1:
        return "another direction: let the estimator see labels (num_classes=), or cut higher up"
    return "a larger estimator, estimator_steps=2, or a lower rate for the network"


def _of_small_error(error: float, figures: Mapping[str, float | None]) -> str:
    if (figures[WEIGHT_ERROR] or 0.0) < 1 or error == 0:  # an exact gradient is merely late
        return ""
    return "errors of rows add up in the weights: a critic, hidden layers, or bp_lambda > 0"


def _advice(figures: Mapping[str, float | None], bp_lambda: float, learns: bool) -> str:
    if bp_lambda == 1 or not (learns or figures["dni_norm_ratio"] == 0):
        return ""
    return advise(figures)


def lambdas_of(engine: Observable) -> dict[str, float]:
    """Lambda by boundary; at truncations, where nothing can be mixed in, 0."""
    truncations = cast(Sequence[str], engine.describe().get("truncations", ()))
    return {**engine.bp_lambda, **dict.fromkeys(truncations, 0.0)}


_ByName = Mapping[str, object]
_READ = (*FIGURES.values(), "dni_bootstrap_error", WEIGHT_ERROR)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
