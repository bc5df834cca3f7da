"""Both ends of a way between two stages in one process."""

from collections import deque

from lightning_dni.errors import StageError
from lightning_dni.pipeline.message import Message


class LocalChannel:
    """A queue with the interface of both ends; whoever runs the stages has to keep their order.

    Args:
        name: What is expected of it, for the error.
    """

    def __init__(self, name: str = "message") -> None:
        self._name = name
        self._messages: deque[Message] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def send(self, message: Message) -> None:
        """Put a message at the end."""
        self._messages.append(message)

    def receive(self) -> Message:
        """Take the message at the front.

        Raises:
            StageError: There is none, and nobody else could send one.
        """
        if not self._messages:
            raise StageError(
                f"Expected a {self._name}, got none: stages in one process take turns, and the one that "
                "sends it has not run yet. Run that stage first."
            )
        return self._messages.popleft()
