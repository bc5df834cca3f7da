"""What travels along with messages: a rider appends its own numbers, and takes them off again."""

from dataclasses import replace
from typing import Protocol, runtime_checkable

from lightning_dni.pipeline.message import Inlet, Kind, Links, Message, Outlet


@runtime_checkable
class Rider(Protocol):
    """Has numbers to send with activations upwards, or with gradients downwards, or with both."""

    def tell(self, kind: Kind, upwards: bool) -> tuple[float, ...]:
        """What to send with a message of this kind."""

    def hear(self, said: tuple[float, ...], upwards: bool) -> None:
        """Take note of what came with a message."""


def carry(rider: Rider, links: Links) -> Links:
    """Ends of the same ways, whose messages carry along what `rider` tells.

    Each layer between an engine and the wire appends its own numbers at the end, with how many they are
    behind them, so layers lie in the same order on both sides.
    """
    up_in, up_out = links.activation_in, links.activation_out
    down_in, down_out = links.gradient_in, links.gradient_out
    return links._replace(
        activation_in=None if up_in is None else _Receiving(up_in, rider, upwards=True),
        activation_out=None if up_out is None else _Sending(up_out, rider, upwards=True),
        gradient_in=None if down_in is None else _Receiving(down_in, rider, upwards=False),
        gradient_out=None if down_out is None else _Sending(down_out, rider, upwards=False),
    )


class _Sending:
    def __init__(self, outlet: Outlet, rider: Rider, upwards: bool) -> None:
        self._outlet, self._rider, self._upwards = outlet, rider, upwards

    def send(self, message: Message) -> None:
        told = self._rider.tell(message.kind, self._upwards)
        self._outlet.send(replace(message, facts=(*message.facts, *told, float(len(told)))))


class _Receiving:
    def __init__(self, inlet: Inlet, rider: Rider, upwards: bool) -> None:
        self._inlet, self._rider, self._upwards = inlet, rider, upwards

    def receive(self) -> Message:
        message = self._inlet.receive()
        end = len(message.facts) - 1
        start = end - int(message.facts[end])
        self._rider.hear(message.facts[start:end], self._upwards)
        return replace(message, facts=message.facts[:start])
