"""What a module of a stage below returns on this stage: the shapes of its output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.calls import plain_call
from lightning_dni.pipeline.keeping import same_buffers, same_randomness
from lightning_dni.pipeline.placeholder import Below
from lightning_dni.pipeline.plan import Leaf, TracedCall
from lightning_dni.pipeline.shapes import Memo, Recipe, Shape, recipe_of, signature_of
from lightning_dni.pipeline.tracing import rows_of

MEMO = 64
"""How many signatures a skipped module remembers."""


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
        self._memo = Memo(MEMO)

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
        signature = signature_of(args, kwargs)
        key = None if signature is None else (self._module.training, signature)
        recipe = self._memo.get(key)
        if recipe is None:
            recipe = self._find(args, kwargs)
            self._memo.put(key, recipe)
        return recipe.make(self._below.make)

    def _find(self, args: Any, kwargs: Any) -> Recipe:
        try:
            output = self._run_on_shapes(args, kwargs)
        except Exception as error:
            return self._as_traced(args, kwargs, error)
        recipe = recipe_of(output)
        if recipe is None:
            raise self._unknown("it returns something that cannot be opened")
        return recipe

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

    def _as_traced(self, args: Any, kwargs: Any, error: Exception) -> Recipe:
        """The shapes of the traced output, with as many rows as there are now."""
        output = self._traced[0].output if self._traced else None
        if output is None or any(not isinstance(x, Leaf) and x is not None for x in output.flat):
            raise self._unknown(f"its code needs values: {error}") from error
        before, now = self._traced[0].rows, rows_of((args, kwargs))
        flat = [x if x is None else _adapted(x, before, now) for x in output.flat]
        return Recipe(flat, output.structure)

    def _unknown(self, why: str) -> BoundaryError:
        return self._below.refuse(
            f"an output of {self._name!r}, a module below it, whose shape cannot be known ({why})",
            "Choose a boundary so that this module and what reads its output are inside one module.",
        )


def _adapted(leaf: Leaf, before: int | None, now: int | None) -> Shape:
    shape = leaf.shape
    if shape and before is not None and now is not None and shape[0] == before:
        shape = (now, *shape[1:])
    with torch.device("meta"):
        return Shape(shape, torch.empty(shape).stride(), leaf.dtype)
