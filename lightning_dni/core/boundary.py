"""Name the submodules whose outputs are cut, and describe what crosses them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_dni.errors import BoundaryError, EstimatorError

T = TypeVar("T")

COMPILED = "_orig_mod"
"""Under what name torch.compile's wrapper holds the module."""

LAST_STAGE = "(last stage)"
"""What the stage above the topmost boundary is called."""


@dataclass(frozen=True)
class LeafSpec:
    """One tensor of an activation: its shape without the batch dimension, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class BoundarySpec:
    """What an estimator factory is told about the boundary it is built for.

    Attributes:
        name: The boundary's submodule name.
        leaves: The tensors that cross, in the order of the flattened output; only those that
            carry a gradient.
        batch_dim: The dimension of every leaf that counts rows.
        device: Where the activations are.
        consumer: The module that consumes the activation, once known and asked for.
        output: The network's output, once known and asked for.
        input: The network's input, for what predicts from it.
    """

    name: str
    leaves: tuple[LeafSpec, ...]
    batch_dim: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    consumer: nn.Module | None = None
    output: LeafSpec | None = None
    input: LeafSpec | None = None

    @classmethod
    def of(cls, name: str, h: Sequence[Tensor]) -> "BoundarySpec":
        """Describe the activations `h` (each of shape `[batch, ...]`) at boundary `name`.

        Raises:
            BoundaryError: An activation has no batch dimension.
        """
        for leaf in h:
            if leaf.ndim == 0:
                raise BoundaryError(
                    f"Expected the output of boundary {name!r} to have a batch dimension, but got a "
                    f"tensor of shape {tuple(leaf.shape)}. Choose a module whose output has one row "
                    "per sample."
                )
        leaves = tuple(LeafSpec(tuple(leaf.shape[1:]), leaf.dtype) for leaf in h)
        return cls(name=name, leaves=leaves, device=h[0].device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row, for estimators that handle one tensor.

        Raises:
            BoundaryError: Several tensors cross this boundary.
        """
        if len(self.leaves) != 1:
            raise BoundaryError(
                f"Expected one tensor at boundary {self.name!r}, but got {len(self.leaves)}. Choose "
                "an estimator that accepts several tensors, or a module that returns one."
            )
        return self.leaves[0].shape

    def state_dict(self) -> dict[str, Any]:
        """The spec in primitives, from which `from_state_dict` rebuilds it."""
        return {
            "name": self.name,
            "shapes": [list(leaf.shape) for leaf in self.leaves],
            "dtypes": [_name(leaf.dtype) for leaf in self.leaves],
            "batch_dim": self.batch_dim,
            **({} if self.input is None else {"input": [list(self.input.shape), _name(self.input.dtype)]}),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "BoundarySpec":
        """Rebuild a spec saved by `state_dict` for `device`."""
        leaves = tuple(
            LeafSpec(tuple(shape), getattr(torch, dtype))
            for shape, dtype in zip(state["shapes"], state["dtypes"], strict=True)
        )
        spec = cls(state["name"], leaves, state["batch_dim"], device)
        if "input" not in state:
            return spec
        shape, dtype = state["input"]
        return replace(spec, input=LeafSpec(tuple(shape), getattr(torch, dtype)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_boundaries(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Find the submodules of `model` that are boundaries; see `resolve_submodules`."""
    return resolve_submodules(model, patterns, "boundaries")


def resolve_submodules(model: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, nn.Module]:
    """Find the submodules of `model` that the names or fnmatch patterns in `patterns` mean.

    A wildcard stays on its level: `net.*` means the children of `net`, not what is inside them. Names
    are those of the model before torch.compile wrapped any of it.

    Returns:
        Submodule by name, in the order in which the model registers them.

    Raises:
        BoundaryError: No pattern is given, a pattern matches nothing, two names are one module, or torch.jit
            has made it.
    """
    given = patterns
    patterns = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise BoundaryError(
            f"Expected `{argument}` to be a non-empty list of submodule names, but got {given!r}. "
            f"The children of {type(model).__name__} are {[n for n, _ in model.named_children()]}."
        )
    modules = named_submodules(model)
    names = [name for name in modules if name]
    chosen: set[str] = set()
    for pattern in patterns:
        pattern = _without_wrappers(pattern)
        matches = [name for name in names if name == pattern]
        matches = matches or [name for name in names if matches_levels(name, pattern)]
        if not matches:
            raise BoundaryError(_unknown(model, pattern, names, argument))
        chosen.update(matches)
    found: dict[str, nn.Module] = {}
    for name in (name for name in names if name in chosen):
        module = modules[name]
        twin = next((other for other, m in found.items() if m is module), None)
        if twin is not None:
            raise BoundaryError(
                f"Expected `{argument}` to name distinct modules, but {twin!r} and {name!r} are the "
                "same module object. Name it once: every call of it is cut."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise BoundaryError(
                f"Expected `{argument}` to name modules that take hooks, but {name!r} was made by torch.jit. "
                "Wrap it in a module that calls it, and name that; or use torch.compile."
            )
        found[name] = module
    return found


def named_submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Every submodule (and `model` itself as "") by the name it has without torch.compile.

    What `torch.compile` has wrapped is found under its own name as the wrapper, from which the output
    comes; checkpoints and logs then have the same names with and without it.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(_without_wrappers(name), module)
    return found


def _without_wrappers(name: str) -> str:
    return ".".join(level for level in name.split(".") if level != COMPILED)


def matches_levels(name: str, pattern: str) -> bool:
    """Whether the dotted `name` matches `pattern` level by level.

    >>> matches_levels("net.3", "net.*"), matches_levels("net.3.bias", "net.*")
    (True, False)
    """
    levels, patterns = name.split("."), pattern.split(".")
    return len(levels) == len(patterns) and all(map(fnmatchcase, levels, patterns))


def _unknown(model: nn.Module, pattern: str, names: Sequence[str], argument: str) -> str:
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"Expected `{argument}` to name submodules of {type(model).__name__}, but got {pattern!r}."
        f"{hint} `print(model)` shows all names."
    )


def choose_by_pattern(name: str, choice: T | Mapping[str, T], argument: str) -> T:
    """The value for boundary `name`: `choice` itself, or the first entry whose pattern matches.

    Raises:
        BoundaryError: `choice` is a mapping and no pattern in it matches `name`.
    """
    if not isinstance(choice, Mapping):
        return choice
    for pattern, value in choice.items():
        if name == pattern or fnmatchcase(name, pattern):
            return value
    raise BoundaryError(
        f"Expected a pattern in `{argument}` to match boundary {name!r}, but got only "
        f"{sorted(choice)}. Add the name, or '*' for the rest."
    )


def choose_by_patterns(names: Iterable[str], choice: T | Mapping[str, T], argument: str) -> dict[str, T]:
    """The value for each boundary, as `choose_by_pattern` gives it.

    Raises:
        BoundaryError: No pattern matches a boundary, or a pattern matches none: it would have no effect.
    """
    names = tuple(names)
    chosen = {name: choose_by_pattern(name, choice, argument) for name in names}
    for pattern in choice if isinstance(choice, Mapping) else ():
        if not any(name == pattern or fnmatchcase(name, str(pattern)) for name in names):
            close = difflib.get_close_matches(str(pattern), names, n=1, cutoff=0.3)
            hint = f" Did you mean {close[0]!r}?" if close else " Leave it out."
            raise BoundaryError(
                f"Expected the patterns in `{argument}` to match boundaries, but {pattern!r} matches none of "
                f"{list(names)}.{hint}"
            )
    return chosen


def choose_factories(
    names: Iterable[str], choice: T | Mapping[str, T], argument: str, example: str, optional: bool = False
) -> dict[str, T]:
    """What makes something for each boundary, as `choose_by_patterns` gives it.

    Args:
        names: Of the boundaries.
        choice: A factory, or {pattern: factory}.
        argument: What the user calls it.
        example: What may be passed.
        optional: Whether it may be None, where nothing is made.

    Raises:
        BoundaryError: As `choose_by_patterns`.
        EstimatorError: Something is made already, or cannot be called.
    """
    chosen = choose_by_patterns(names, choice, argument)
    for name, factory in chosen.items():
        if optional and factory is None:
            continue
        if isinstance(factory, nn.Module) or not callable(factory):
            got = repr(factory) if isinstance(factory, (str, int, float)) else f"one {type(factory).__name__}"
            raise EstimatorError(
                f"Expected `{argument}` to be a class or a function that makes one for boundary {name!r}, "
                f"but got {got}. Pass {example}."
            )
    return chosen


def modules_by_stage(model: nn.Module, boundaries: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """The submodules of each stage, by the boundary above it, upwards; `LAST_STAGE` is the last.

    A stage is what the model registers after the boundary below and up to its own, which is the forward
    order of most modules; training itself follows autograd's graph.

    Args:
        model: The model.
        boundaries: The boundaries' modules by name.
    """
    order = {module: place for place, module in enumerate(model.modules())}
    ends = {name: max(order[m] for m in module.modules()) for name, module in boundaries.items()}
    upwards = sorted(ends, key=lambda name: ends[name])
    found: dict[str, list[nn.Module]] = {name: [] for name in [*upwards, LAST_STAGE]}
    for module, place in order.items():
        found[next((name for name in upwards if ends[name] >= place), LAST_STAGE)].append(module)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of `model` is; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def resolve_output(model: nn.Module, output: str | None) -> nn.Module:
    """The submodule named `output`, or `model` itself for None.

    Raises:
        BoundaryError: There is none of that name.
    """
    modules = named_submodules(model)
    if output is not None and output not in modules:
        raise BoundaryError(
            f"Expected `output` to name a submodule of {type(model).__name__}, but got {output!r}. "
            f"Its children are {[n for n in modules if n and '.' not in n]}."
        )
    return model if output is None else modules[output]
