"""Open a boundary's output into its tensors, and put it together again."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.errors import BoundaryError

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, Enum)
"""What may stand beside tensors because no tensor can hide in it."""


def is_plain(x: Any) -> bool:
    """Whether `x` is something in which no tensor can hide."""
    return x is None or isinstance(x, _PLAIN)


def open_value(boundary: str, value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten a tensor, or a tuple, list, dict or named tuple of them, however nested.

    Raises:
        BoundaryError: Something else is in it, in which a tensor could pass uncut.
    """
    flat, structure = pytree.tree_flatten(value)
    opaque = next((x for x in flat if not isinstance(x, Tensor) and not is_plain(x)), None)
    if opaque is not None:
        raise BoundaryError(
            f"Expected the output of boundary {boundary!r} to be a tensor, or a tuple, list or dict of "
            f"tensors, but got {type(opaque).__name__} in it, which cannot be opened. Choose a module with "
            "such an output, or register the type with torch.utils._pytree.register_pytree_node."
        )
    return flat, structure


def differentiable(flat: list[Any], boundary: str) -> list[int]:
    """Places of the tensors that carry a gradient.

    Raises:
        BoundaryError: One of them is complex.
    """
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
    strange = next((flat[i].dtype for i in places if flat[i].is_complex()), None)
    if strange is not None:
        raise BoundaryError(
            f"Expected real activations at boundary {boundary!r}, but got {strange}. Choose a module "
            "whose output is real."
        )
    return places


def close_value(flat: list[Any], structure: pytree.TreeSpec) -> Any:
    """Undo `open_value`."""
    return pytree.tree_unflatten(flat, structure)
