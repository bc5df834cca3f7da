"""What a run was configured with, in primitives that every logger accepts."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_dni.core.report import Observable

PACKAGES = ("lightning-dni", "torch", "lightning")


def describe_run(trainer: pl.Trainer, engine: Observable, recipe: str | None) -> dict[str, Any]:
    """The hyperparameters of a run under one key, `dni`, where they meet none of the user's.

    Args:
        trainer: Its optimizers are the user's.
        engine: Its estimators are known after the first step only.
        recipe: Name of the recipe, if there is one.
    """
    facts = dict(engine.describe())
    estimator_optimizers = facts.pop("estimator_optimizers", [])
    assert isinstance(estimator_optimizers, Sequence)
    return {
        "dni": {
            "staleness": 0,
            **{name: _readable(fact) for name, fact in facts.items()},
            **_numbered("optimizer", [_describe_optimizer(o) for o in trainer.optimizers]),
            **_numbered("estimator_optimizer", estimator_optimizers),
            "recipe": recipe,
            "versions": {name.replace("-", "_"): _version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
        }
    }


def _readable(fact: object) -> object:
    # dots separate levels in W&B's tables: boundaries are spelt there as they are in metric keys
    if isinstance(fact, Mapping):
        return {str(key).replace(".", "_"): value for key, value in fact.items()}
    return fact


def _describe_optimizer(optimizer: Optimizer) -> dict[str, object]:
    # a scheduler keeps the configured rate beside the current one
    rates = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups if "lr" in g]
    same = len(set(rates)) == 1
    return {"name": type(optimizer).__name__, "lr": rates[0] if same else rates}


def _numbered(name: str, found: Sequence[Any]) -> dict[str, Any]:
    """One entry for one, numbered entries for several: loggers compare runs by entries, not by lists."""
    if len(found) == 1:
        return {name: found[0]}
    return {f"{name}_{i}": entry for i, entry in enumerate(found)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
