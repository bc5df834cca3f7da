"""What crosses a boundary between two stages, and the two ends of the way it takes."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Kind(IntEnum):
    """What the batch is for that a message belongs to; MEET is no batch, but says that all come together."""

    TRAIN = 0
    EVALUATE = 1
    MEET = 2


@dataclass(frozen=True)
class Message:
    """One batch at one boundary: an activation upwards, a gradient or the network's output downwards.

    Attributes:
        step: Number of the batch among those of its kind; both ends count.
        kind: What the batch is for.
        tensors: What crosses, in a fixed order; None stands for exactly zero.
        fingerprint: Number that two stages with the same batch agree on; 0 where nobody asks.
        facts: Figures that travel along.
    """

    step: int
    kind: Kind
    tensors: tuple[Tensor | None, ...] = ()
    fingerprint: int = 0
    facts: tuple[float, ...] = ()


@runtime_checkable
class Outlet(Protocol):
    """The end that sends."""

    def send(self, message: Message) -> None:
        """Hand a message over; waits only while as many as the way holds are under way.

        The tensors must not be changed afterwards.

        Raises:
            StageError: Another stage has stopped.
        """


@runtime_checkable
class Inlet(Protocol):
    """The end that receives."""

    def receive(self) -> Message:
        """The next message, in the order in which they were sent; waits for it.

        Raises:
            StageError: Another stage has stopped.
        """


class Links(NamedTuple):
    """The ways between one stage and its neighbours; None where there is no neighbour or no need.

    Attributes:
        activation_in: Activations from the stage below.
        activation_out: Activations to the stage above.
        gradient_in: Target gradients from the stage above.
        gradient_out: Target gradients to the stage below.
        output_in: The network's output, relayed by the stage above.
        output_out: The same, relayed to the stage below.
    """

    activation_in: Inlet | None = None
    activation_out: Outlet | None = None
    gradient_in: Inlet | None = None
    gradient_out: Outlet | None = None
    output_in: Inlet | None = None
    output_out: Outlet | None = None
