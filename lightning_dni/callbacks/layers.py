"""Which submodules are the layers of a model, where nobody says so or by names and patterns."""

from collections.abc import Collection, Sequence

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
