"""The engine's options as a strategy holds them, from its constructor or from the user's module."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
from torch import nn

from lightning_dni.core.base import Engine, UpdateTime
from lightning_dni.core.bootstrap import SequenceEnd
from lightning_dni.core.boundary import choose_by_pattern
from lightning_dni.core.carry import Truncations
from lightning_dni.core.context import Labels, Where
from lightning_dni.core.estimator import Signal
from lightning_dni.core.health import OnNonfinite
from lightning_dni.core.inputs import InputFactory
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory, may_ask
from lightning_dni.core.target import Denominator
from lightning_dni.pipeline.exact import no_estimator
from lightning_dni.strategies._compat import MisconfigurationException

E = TypeVar("E", bound=Engine)

Boundaries = list[str] | Literal["auto"]

AUTO: Literal["auto"] = "auto"
"""Boundaries that a pipeline chooses itself."""


@dataclass(frozen=True)
class DNIOptions:
    """What `DNIEngine` is built with; the fields are its arguments."""

    boundaries: Boundaries
    estimator: EstimatorFactory | Mapping[str, EstimatorFactory]
    labels: Labels = "auto"
    output: str | None = None
    estimator_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None
    estimator_steps: int = 1
    estimator_scheduler: ScheduleFactory | None = None
    estimator_clip_norm: float | None = None
    bp_lambda: float | Mapping[str, float] = 0.0
    update_probability: float | Mapping[str, float] = 1.0
    update: UpdateTime = "step"
    loss_denominator: Denominator = "batch"
    rng: Literal["global", "stage"] = "global"
    on_nonfinite: OnNonfinite = "raise"
    synthetic_inputs: InputFactory | Mapping[str, InputFactory | None] | None = None
    network_input: Where = "auto"
    input_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None
    truncations: Truncations | None = None
    damping: float | Mapping[str, float] = 1.0
    sequence_end: SequenceEnd = "zero"

    def build(self, kind: type[E], model: nn.Module, **replica: Any) -> E:
        """An engine of `kind` for `model`; `replica` makes it one of several (seed, exchange, rank)."""
        return kind(model, **{f.name: getattr(self, f.name) for f in fields(self)}, **replica)


def options_given(given: Mapping[str, Any]) -> DNIOptions | None:
    """The options passed to a strategy, or None where it was left to the module to give them.

    Raises:
        MisconfigurationException: Some are passed, but not both `boundaries` (or `truncations`) and
            `estimator`.
    """
    where = {**given, "boundaries": given["boundaries"] or []} if given.get("truncations") else given
    if where["boundaries"] is not None and given["estimator"] is not None:
        return DNIOptions(**where)
    if passed(given):
        raise MisconfigurationException(
            "Expected `boundaries` and `estimator` together where a strategy is given options (or "
            "`truncations` and `estimator`), or no option (the module's `configure_dni` gives them then), "
            f"but got only {passed(given)}."
        )
    return None


def refuse_auto(options: DNIOptions, strategy: str) -> DNIOptions:
    """Refuse boundaries that only a pipeline can choose.

    Raises:
        MisconfigurationException: They are to be chosen.
    """
    if options.boundaries == AUTO:
        raise MisconfigurationException(
            f"Expected `boundaries` to be names of submodules under strategy={strategy!r}, but got 'auto'. "
            "Name them; only strategy='dni_pipeline' chooses them, so that its stages take equally long."
        )
    return options


def refuse_truncations(options: DNIOptions, strategy: str) -> DNIOptions:
    """Refuse truncations where stages train in processes of their own.

    Raises:
        MisconfigurationException: There are some.
    """
    if options.truncations:
        raise MisconfigurationException(
            f"Expected no `truncations` in a pipeline, but got {list(options.truncations)} under "
            f"strategy={strategy!r}. Train under strategy='dni' or 'dni_ddp'."
        )
    return options


def passed(given: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ from what they are when left out."""
    defaults = {f.name: f.default for f in fields(DNIOptions) if f.default is not MISSING}
    return [name for name, value in given.items() if value != defaults.get(name)]


def options_from(module: pl.LightningModule, exact: bool = False) -> DNIOptions:
    """The options that `module.configure_dni()` returns; of an exact schedule, those about stages alone.

    Raises:
        MisconfigurationException: The hook is missing, or returns something else than these options.
    """
    hook = getattr(module, "configure_dni", None)
    known = [f.name for f in fields(DNIOptions)]
    children = [name for name, _ in module.named_children()]
    if hook is None:
        raise MisconfigurationException(
            f"Expected boundaries for {type(module).__name__}, but got none: the strategy was built without "
            f"`boundaries` and the module has no `configure_dni()`. Pass DNIStrategy(boundaries=[...], "
            f"estimator=...), or define `configure_dni` returning them. The module's children are {children}."
        )
    options: Any = hook()
    if exact and isinstance(options, Mapping):
        options = {"estimator": no_estimator, **options}
    if isinstance(options, Mapping) and options.get("truncations"):
        options = {"boundaries": [], **options}
    if not isinstance(options, Mapping) or not {"boundaries", "estimator"} <= set(options) <= set(known):
        got = sorted(map(str, options)) if isinstance(options, Mapping) else type(options).__name__
        raise MisconfigurationException(
            f"Expected {type(module).__name__}.configure_dni() to return a dict with 'boundaries' (or "
            f"'truncations') and 'estimator' and otherwise only keys of {known}, but got {got}."
        )
    if exact:
        return DNIOptions(options["boundaries"], no_estimator, output=options.get("output"))
    return DNIOptions(**options)


def hears_output(options: DNIOptions, boundaries: Iterable[str]) -> bool:
    """Whether an estimator may ask for the network's output; one that a function makes may."""
    factories = (choose_by_pattern(name, options.estimator, "estimator") for name in boundaries)
    return may_ask(factories, {Signal.OUTPUT, Signal.OUTPUT_GRADIENT})
