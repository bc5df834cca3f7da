"""What a module of a stage below returns on this stage: the shapes of its output."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.value import close_value, is_plain, open_value
from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.calls import plain_call
from lightning_dni.pipeline.keeping import same_buffers, same_randomness
from lightning_dni.pipeline.placeholder import Below, bare
from lightning_dni.pipeline.plan import Leaf, TracedCall
from lightning_dni.pipeline.tracing import rows_of

MEMO = 64
"""How many signatures a skipped module remembers."""


class _Shape(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


class _Recipe(NamedTuple):
    flat: Sequence[Any]
    structure: pytree.TreeSpec


class SkippedModule:
    """Answers for a module that belongs to a stage below.

    Args:
        name: The module's name.
        module: The module.
        traced: Its calls when the model was traced.
        below: What this stage may do with the answers.
    """

    def __init__(self, name: str, module: nn.Module, traced: Sequence[TracedCall], below: Below) -> None:
        self._name, self._module, self._traced, self._below = name, module, traced, below
        self._memo: dict[Any, _Recipe] = {}

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """Placeholders for what the module would return.

        Raises:
            BoundaryError: The stage's input has arrived already, or the output cannot be known.
        """
        if not self._below.open:
            raise self._below.refuse(
                f"a run of {self._name!r}, a module below it, after that output had arrived",
                "Choose boundaries behind the module's last use.",
            )
        key = self._signature(args, kwargs)
        recipe = None if key is None else self._memo.get(key)
        if recipe is None:
            recipe = self._find(args, kwargs)
            if key is not None:
                if len(self._memo) >= MEMO:
                    self._memo.clear()
                self._memo[key] = recipe
        flat = [self._below.mark(x.make()) if isinstance(x, _Shape) else x for x in recipe.flat]
        return close_value(flat, recipe.structure)

    def _signature(self, args: Any, kwargs: Any) -> Any:
        """What the shapes depend on; None where that cannot be said."""
        if kwargs or not all(isinstance(x, Tensor) for x in args):
            flat, structure = pytree.tree_flatten((args, kwargs))
        else:
            flat, structure = args, None
        if not all(isinstance(x, Tensor) or is_plain(x) for x in flat):
            return None
        facts = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in flat)
        return self._module.training, structure, facts

    def _find(self, args: Any, kwargs: Any) -> _Recipe:
        try:
            output = self._run_on_shapes(args, kwargs)
        except Exception as error:
            return self._as_traced(args, kwargs, error)
        try:
            flat, structure = open_value(self._name, output)
        except BoundaryError as error:
            raise self._unknown(str(error)) from error
        shapes = [
            _Shape(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x
            for x in map(bare, flat)
        ]
        return _Recipe(shapes, structure)

    def _run_on_shapes(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._below.mark((args, kwargs))
        with (
            same_buffers(self._module),
            same_randomness(self._below.device),
            torch.no_grad(),
            torch.device("meta"),
            self._below.shapes_only(),
        ):
            return plain_call(self._module)(*args, **kwargs)

    def _as_traced(self, args: Any, kwargs: Any, error: Exception) -> _Recipe:
        """The shapes of the traced output, with as many rows as there are now."""
        output = self._traced[0].output if self._traced else None
        if output is None or any(not isinstance(x, Leaf) and x is not None for x in output.flat):
            raise self._unknown(f"its code needs values: {error}") from error
        before, now = self._traced[0].rows, rows_of((args, kwargs))
        flat = [x if x is None else _adapted(x, before, now) for x in output.flat]
        return _Recipe(flat, output.structure)

    def _unknown(self, why: str) -> BoundaryError:
        return self._below.refuse(
            f"an output of {self._name!r}, a module below it, whose shape cannot be known ({why})",
            "Choose a boundary so that this module and what reads its output are inside one module.",
        )


def _adapted(leaf: Leaf, before: int | None, now: int | None) -> _Shape:
    shape = leaf.shape
    if shape and before is not None and now is not None and shape[0] == before:
        shape = (now, *shape[1:])
    with torch.device("meta"):
        return _Shape(shape, torch.empty(shape).stride(), leaf.dtype)
