"""Letters to the last stage: small records of numbers that travel along with the activations.

What travels along with a message is a list of numbers, its facts. Each layer between an engine and the wire
appends its own at the end, with their number behind them, and takes them off again on the other side.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

from lightning_dni.pipeline.header import MAX_FACTS
from lightning_dni.pipeline.message import Inlet, Kind, Links, Message, Outlet

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
        into, out = links.activation_in, links.activation_out
        return links._replace(
            activation_in=None if into is None else _Receiving(into, self),
            activation_out=None if out is None else _Sending(out, self),
        )

    def post(self, letter: Letter) -> None:
        """Have a letter brought to the last stage."""
        if self._is_last:
            self._deliver(letter)
        else:
            self._waiting.append(letter)

    def take(self) -> tuple[float, ...]:
        """As many letters as have room, encoded."""
        taken: tuple[float, ...] = ()
        while self._waiting:
            encoded = self._waiting[0].encode()
            if len(taken) + len(encoded) > ROOM:
                break
            self._waiting.popleft()
            taken += encoded
        return taken


class _Sending:
    def __init__(self, outlet: Outlet, mail: Mail) -> None:
        self._outlet, self._mail = outlet, mail

    def send(self, message: Message) -> None:
        letters = self._mail.take() if message.kind is Kind.TRAIN else ()
        self._outlet.send(replace(message, facts=(*message.facts, *letters, float(len(letters)))))


class _Receiving:
    def __init__(self, inlet: Inlet, mail: Mail) -> None:
        self._inlet, self._mail = inlet, mail

    def receive(self) -> Message:
        message = self._inlet.receive()
        count = int(message.facts[-1])
        end = len(message.facts) - 1
        for letter in open_bag(message.facts[end - count : end]):
            self._mail.post(letter)
        return replace(message, facts=message.facts[: end - count])
