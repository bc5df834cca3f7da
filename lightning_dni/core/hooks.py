"""Keep hooks of the user's from seeing what is only ours."""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooks_asleep(registries: Sequence[MutableMapping[int, Any]]) -> Iterator[None]:
    """Have the hooks in `registries`, torch's own mappings of them, not called inside the block."""
    kept = [dict(each) for each in registries]
    for each in registries:
        each.clear()
    try:
        yield
    finally:
        for each, content in zip(registries, kept, strict=True):
            each.update(content)
