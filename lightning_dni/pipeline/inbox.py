"""What comes back to a stage from above, and when it may be learnt from: after a fixed number of updates."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from lightning_dni.core.estimator import Signal
from lightning_dni.errors import StageError
from lightning_dni.pipeline.message import Inlet, Links, Message
from lightning_dni.pipeline.pending import Pending, take_gradient


class Passed(NamedTuple):
    """A forward pass whose network output has still to be heard of; `pending` is None where nobody asks."""

    step: int
    update: int
    pending: Pending | None


class Inbox:
    """Crossings of one stage that wait for their target gradients, and outputs to be relayed.

    A target gradient is due `staleness` updates after its forward pass. The network's output comes down one
    stage in that time, so it is due later the lower the stage is. What comes earlier waits.

    Args:
        links: The ways to the neighbours.
        staleness: The lag, in updates.
        above: Number of stages above.
    """

    def __init__(self, links: Links, staleness: int, above: int) -> None:
        self._links, self._staleness, self._above = links, staleness, above
        self.pending: deque[Pending] = deque()
        self.passed: deque[Passed] = deque()

    def add(self, step: int, update: int, crossing: Pending | None) -> None:
        """A forward pass is over; `crossing` is None where nothing below takes a gradient."""
        if crossing is not None:
            self.pending.append(crossing)
        if self._links.output_in is not None:
            self.passed.append(Passed(step, update, crossing))
        self._receive_early()

    def _receive_early(self) -> None:
        """Let no more be under way than the links carry, however many forward passes make an update.

        Else the stage above would wait for this one in the middle of its update, or before a collective.
        """
        limit = self._staleness + 1
        for crossing in list(self.pending)[:-limit]:
            self.take_gradient(crossing)
        while len(self.passed) > limit * self._above:
            self._take_output()

    def collect(self, update: int) -> list[Pending]:
        """Wait for what is due after `update`, and give the crossings that can be learnt from."""
        for crossing in self.pending:
            if crossing.update <= update - self._staleness:
                self.take_gradient(crossing)
        while self.passed and self.passed[0].update <= update - self._staleness * self._above:
            self._take_output()
        due: list[Pending] = []
        while self.pending and self.pending[0].update <= update - self._lag(self.pending[0]):
            due.append(self.pending.popleft())
        return due

    def _lag(self, crossing: Pending) -> int:
        hears_output = Signal.OUTPUT in crossing.cut.installed.estimator.needs
        return self._staleness * (self._above if hears_output else 1)

    def hear(self, crossing: Pending) -> None:
        """Wait for all that `crossing` cannot be differentiated without."""
        if Signal.OUTPUT_GRADIENT in crossing.cut.installed.estimator.needs:
            self.take_output(crossing)
        if crossing.cut.hears_from_above:
            self.take_gradient(crossing)

    def take_gradient(self, crossing: Pending) -> None:
        """Wait for the target gradient of `crossing`, if it is not here yet."""
        if crossing.gradient is None:
            crossing.gradient = next_message(self._links.gradient_in, crossing.step, "target gradient")
            take_gradient(crossing.cut, crossing.gradient)

    def take_output(self, crossing: Pending) -> None:
        """Wait for the network's output of `crossing`, if it is not here yet."""
        while crossing.output is None:
            self._take_output()

    def take_true(self, crossing: Pending) -> tuple[Tensor | None, ...]:
        """Wait for the true gradient of `crossing`, the newest one; on a drained stage it comes next."""
        return next_message(self._links.gradient_in, crossing.step, "true gradient").tensors

    def _take_output(self) -> None:
        """Wait for the next output of the network, and hand it on."""
        passed = self.passed.popleft()
        message = next_message(self._links.output_in, passed.step, "network output")
        if self._links.output_out is not None:
            self._links.output_out.send(message)
        if passed.pending is not None:
            passed.pending.output = message

    def drain(self) -> None:
        """Receive, without learning from it, everything that is under way to this stage."""
        for crossing in self.pending:
            self.take_gradient(crossing)
        while self.passed:
            self._take_output()

    def restore(self, crossings: Iterable[Pending]) -> None:
        """Go on with crossings of a drained stage."""
        self.pending, self.passed = deque(crossings), deque()


def next_message(inlet: Inlet | None, step: int, what: str) -> Message:
    """The next message from the stage above; waits for it.

    Raises:
        StageError: It belongs to another batch than `step`, or that stage has stopped.
    """
    assert inlet is not None
    message = inlet.receive()
    if message.step != step:
        raise StageError(
            f"Expected the {what} of training batch {step} from the stage above, but got that of batch "
            f"{message.step}. Give every process the same number of batches in the same order."
        )
    return message
