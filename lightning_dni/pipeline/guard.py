"""What a channel asks while it waits: does every other stage still run?"""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from lightning_dni.errors import StageError

T = TypeVar("T")


@runtime_checkable
class Guard(Protocol):
    """Who knows about the other processes."""

    def check(self) -> None:
        """Return at once where nothing is known to be wrong.

        Raises:
            StageError: A stage has stopped.
        """

    def blame(self, symptom: Exception) -> StageError:
        """The error to raise where a connection was lost: the cause, if it becomes known soon."""

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, which waits for other processes.

        Raises:
            StageError: A stage has stopped meanwhile.
        """


class Unguarded:
    """Nobody watches: the symptom is all there is to tell."""

    def check(self) -> None:
        """Nothing is known."""

    def blame(self, symptom: Exception) -> StageError:
        """The symptom itself."""
        return symptom if isinstance(symptom, StageError) else StageError(str(symptom))

    def call(self, function: Callable[[], T]) -> T:
        """Call it."""
        return function()
