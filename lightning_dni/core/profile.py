"""Time the phases of a step, under the names that they go by."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Profile = Callable[[str], AbstractContextManager[object]]
"""Times what runs inside it, under a name."""

_UNTIMED: AbstractContextManager[object] = nullcontext()


def no_profile(name: str) -> AbstractContextManager[object]:
    """Time nothing."""
    return _UNTIMED
