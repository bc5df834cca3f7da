"""Letters to the last stage: small records of numbers that travel along with the activations."""

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from lightning_dni.pipeline.header import MAX_FACTS
from lightning_dni.pipeline.message import Kind, Links
from lightning_dni.pipeline.riding import carry

ROOM = MAX_FACTS - 16
"""Numbers of one message that letters may fill; the others are left to the engine and to other layers."""


class Topic(IntEnum):
    """What a letter tells about."""

    FIGURES = 0
    UTILIZATION = 1


class Letter(NamedTuple):
    """What one stage has to tell.

    Attributes:
        topic: What it is about.
        stage: The stage that tells.
        step: The training batch that it tells of.
        numbers: What it says.
    """

    topic: Topic
    stage: int
    step: int
    numbers: tuple[float, ...]

    def encode(self) -> tuple[float, ...]:
        """The letter as plain numbers, the first of which is how many follow."""
        return (float(len(self.numbers) + 3), *map(float, self[:3]), *self.numbers)


def open_bag(numbers: tuple[float, ...]) -> list[Letter]:
    """The letters that were encoded one after another."""
    letters: list[Letter] = []
    while numbers:
        end = 1 + int(numbers[0])
        topic, stage, step, *said = numbers[1:end]
        letters.append(Letter(Topic(int(topic)), int(stage), int(step), tuple(said)))
        numbers = numbers[end:]
    return letters


class Mail:
    """The letters that one stage has to send on; those that reach the last stage are delivered there.

    A message takes as many as have room in it; the others go with the next one, in the order in which they
    came.

    Args:
        deliver: Takes a letter, on the last stage.
    """

    def __init__(self, deliver: Callable[[Letter], None]) -> None:
        self._deliver = deliver
        self._waiting: deque[Letter] = deque()
        self._is_last = True

    def carry(self, links: Links) -> Links:
        """Ends of the same ways, whose activations carry letters along."""
        self._is_last = links.activation_out is None
        self._waiting.clear()
        return carry(self, links)

    def post(self, letter: Letter) -> None:
        """Have a letter brought to the last stage."""
        if self._is_last:
            self._deliver(letter)
        else:
            self._waiting.append(letter)

    def hear(self, said: tuple[float, ...], upwards: bool) -> None:
        """Send on the letters that came with a message, or deliver them."""
        for letter in open_bag(said):
            self.post(letter)

    def tell(self, kind: Kind, upwards: bool) -> tuple[float, ...]:
        """As many letters as have room in a training activation, encoded."""
        taken: tuple[float, ...] = ()
        while self._waiting and upwards and kind is Kind.TRAIN:
            encoded = self._waiting[0].encode()
            if len(taken) + len(encoded) > ROOM:
                break
            self._waiting.popleft()
            taken += encoded
        return taken
