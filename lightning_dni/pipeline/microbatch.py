"""Split the user's batch into microbatches, along the first dimension of its tensors."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_dni.core.value import is_plain
from lightning_dni.errors import StageError


def split_batch(batch: Any, microbatches: int) -> list[Any]:
    """Split `batch` into parts of equal rows; the first ones have one more where that does not come out even.

    Lists, tuples, mappings, named tuples and dataclasses are opened, however nested. Tensors are split by
    rows, and so are lists of as many strings; scalars and other plain values are in every part.

    Args:
        batch: What the user's training step receives.
        microbatches: Number of parts; one is the batch itself.

    Raises:
        StageError: There are fewer rows than parts, tensors have different numbers of rows, there is no
            tensor, or something cannot be opened.
    """
    if microbatches == 1:
        return [batch]
    rows = _rows(batch)
    if rows < microbatches:
        raise StageError(
            f"Expected at least {microbatches} rows in every batch, one per microbatch, but got {rows}. Pass "
            "fewer `microbatches`, or drop_last=True to the DataLoader."
        )
    least, more = divmod(rows, microbatches)
    ends = [least * i + min(i, more) for i in range(microbatches + 1)]
    return [_part(batch, slice(a, b), rows) for a, b in pairwise(ends)]


def _rows(batch: Any) -> int:
    tensors = {where: x for where, x in _leaves(batch, "batch") if isinstance(x, Tensor) and x.ndim}
    if not tensors:
        raise StageError(
            f"Expected tensors to split into microbatches in a batch, but got {type(batch).__name__} without "
            "any. Return tensors from the collate function, or leave `microbatches` out."
        )
    sizes = {where: len(x) for where, x in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise StageError(
            f"Expected all tensors of a batch to have the same number of rows, but got {sizes}. Give every "
            "tensor one row per sample, or keep what is not per sample in the module."
        )
    return next(iter(sizes.values()))


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    opened = _open(value)
    if opened is None:
        if not isinstance(value, Tensor) and not is_plain(value):
            raise StageError(
                f"Expected a batch of tensors and plain values, but got {type(value).__name__} at {where}, "
                "which cannot be split. Return tensors, lists, tuples, mappings or dataclasses of them from "
                "the collate function."
            )
        yield where, value
        return
    for key, item in opened.items():
        yield from _leaves(item, f"{where}[{key!r}]")


def _open(value: Any) -> dict[Any, Any] | None:
    """What `value` contains, by key; None where it cannot be opened."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _part(value: Any, rows: slice, of: int) -> Any:
    if isinstance(value, Tensor):
        # a copy is aligned as the loader's tensors are, without which some kernels round otherwise
        return value[rows].clone() if value.ndim else value
    if isinstance(value, list | tuple):
        if len(value) == of and all(isinstance(x, str | bytes) for x in value):
            return value[rows]
        parts = [_part(x, rows, of) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    opened = _open(value)
    return value if opened is None else _like(value, {k: _part(x, rows, of) for k, x in opened.items()})


def _like(value: Any, parts: dict[Any, Any]) -> Any:
    """A mapping or dataclass like `value`, of its own type, that holds `parts`."""
    twin = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, Mapping):
            twin[key] = part
        else:
            object.__setattr__(twin, key, part)  # also where it is frozen
    return twin
