"""Which submodules are the layers of a model, where nobody says so or by names and patterns."""

from collections.abc import Collection, Sequence
from itertools import takewhile

from torch import nn

from lightning_dni.callbacks._compat import MisconfigurationException
from lightning_dni.core.boundary import matches_levels, named_submodules


def resolve_layers(
    model: nn.Module, patterns: Sequence[str] | None, boundaries: Collection[str]
) -> dict[str, nn.Module]:
    """The layers of `model`, in the order in which it registers them.

    Args:
        model: The network.
        patterns: Names or fnmatch patterns, a wildcard for one level. None: the boundaries, with what has
            parameters beside them; without a boundary, the parts of the first submodule in which several
            parts have parameters.
        boundaries: Names of the boundaries, if the model is cut.

    Returns:
        Submodule by name.

    Raises:
        MisconfigurationException: A pattern matches nothing.
    """
    modules = {name: module for name, module in named_submodules(model).items() if name}
    if patterns is not None:
        return _named(model, modules, patterns)
    parents = {_parent(name) for name in boundaries} or {_first_parent(model)}
    return {
        name: module
        for name, module in modules.items()
        if name in boundaries or (_parent(name) in parents and _has_parameters(module))
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Names without what all begin with, up to a dot or an underscore; a single one stays whole.

    Numbers that begin at 0 are counted from 1, as texts count layers.

    >>> short_names(["net.hidden_1", "net.hidden_10"])
    ['1', '10']
    >>> short_names(["net.hidden_0", "net.hidden_9"])
    ['1', '10']
    """
    shared = list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
    ends = [place + 1 for place, letters in enumerate(shared) if letters[0] in "._"]
    short = [name[ends[-1] :] if ends and len(names) > 1 else name for name in names]
    if "0" in short and all(name.isdecimal() for name in short):
        return [str(int(name) + 1) for name in short]
    return short


def layers_before(model: nn.Module, layers: Collection[str], boundaries: Collection[str]) -> tuple[str, ...]:
    """The layers behind which `model` is cut: a boundary itself, or else the last layer before its end.

    Args:
        model: The network.
        layers: Names in the order in which the model registers them.
        boundaries: Names of the boundaries; one that is inside of a layer is behind none.
    """
    places = {name: place for place, name in enumerate(named_submodules(model))}
    found: set[str] = set()
    for boundary in boundaries:
        around = any(boundary.startswith(f"{layer}.") for layer in layers)
        before = [
            layer for layer in layers if layer.startswith(f"{boundary}.") or places[layer] < places[boundary]
        ]
        if boundary in layers:
            found.add(boundary)
        elif not around:
            found.update(before[-1:])
    return tuple(layer for layer in layers if layer in found)


def _named(model: nn.Module, modules: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    chosen: set[str] = set()
    for pattern in patterns:
        matches = {name for name in modules if name == pattern or matches_levels(name, pattern)}
        if not matches:
            raise MisconfigurationException(
                f"Expected `layers` to name submodules of {type(model).__name__}, but got {pattern!r}. "
                "`print(model)` shows all names."
            )
        chosen |= matches
    return {name: module for name, module in modules.items() if name in chosen}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _first_parent(model: nn.Module) -> str:
    """The name of the first submodule, from the top, with several children that have parameters."""
    name, module = "", model
    while True:
        children = [(n, child) for n, child in module.named_children() if _has_parameters(child)]
        if len(children) != 1:
            return name
        name, module = f"{name}.{children[0][0]}".lstrip("."), children[0][1]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
