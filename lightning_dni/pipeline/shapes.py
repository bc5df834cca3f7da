"""Remember the shapes of an output by the shapes of what went in."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.core.value import close_value, is_plain


class Shape(NamedTuple):
    """All that a tensor without values is."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Recipe(NamedTuple):
    """How to make an output again: a `Shape` in the place of every tensor."""

    flat: Sequence[Any]
    structure: pytree.TreeSpec

    def make(self, placeholder: Callable[..., Tensor]) -> Any:
        """The output, with what `placeholder` makes of a shape."""
        flat = [placeholder(*x) if isinstance(x, Shape) else x for x in self.flat]
        return flat[0] if self.structure.is_leaf() else close_value(flat, self.structure)


def recipe_of(output: Any) -> Recipe | None:
    """How to make `output` again; None where something in it cannot be opened."""
    with torch._C.DisableTorchFunction():
        flat, structure = pytree.tree_flatten(output)
        if not all(isinstance(x, Tensor) or is_plain(x) for x in flat):
            return None
        shapes = [Shape(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in flat]
        return Recipe(shapes, structure)


def signature_of(args: Any, kwargs: Any) -> Any:
    """What the shapes of an output depend on; None where that cannot be said."""
    with torch._C.DisableTorchFunction():
        if kwargs or not all(isinstance(x, Tensor) for x in args):
            flat, spec = pytree.tree_flatten((args, kwargs))
            structure = repr(spec)  # older specs of dicts have no hash
        else:
            flat, structure = args, ""
        if not all(isinstance(x, Tensor) or is_plain(x) for x in flat):
            return None
        return structure, tuple(
            (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in flat
        )


class Memo:
    """At most `size` recipes, forgotten all at once when there are more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._recipes: dict[Any, Recipe] = {}

    def get(self, key: Any) -> Recipe | None:
        """The recipe for `key`, if it is known."""
        return None if key is None else self._recipes.get(key)

    def put(self, key: Any, recipe: Recipe | None) -> None:
        """Remember `recipe`, unless one of the two cannot be said."""
        if key is None or recipe is None:
            return
        if len(self._recipes) >= self._size:
            self._recipes.clear()
        self._recipes[key] = recipe
