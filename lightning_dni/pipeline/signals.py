"""What one stage asks of all: it travels along with the messages, and all do it after the same batch.

A request goes down to stage 0 with the target gradients. Stage 0 is the first to begin a batch: what it has
heard of by then it decides for this batch, and says so in its activation. So every stage knows in time, at
the same batch, and none waits for another.
"""

from collections.abc import Callable
from enum import IntFlag
from typing import Protocol, runtime_checkable

from lightning_dni.pipeline.message import Kind


class Ask(IntFlag):
    """What can be asked for."""

    NOTHING = 0
    STOP = 1
    LEAVE = 2


@runtime_checkable
class Notices(Protocol):
    """A way for requests beside that of the messages: slower, and there also where nothing comes back."""

    def ask(self, asked: int) -> None:
        """Tell all processes, some time."""

    def asked(self) -> int:
        """What any process is known to have asked for."""


class Signals:
    """The requests that one stage knows of, and what is decided for the batch that it works on.

    The same request in the same step has the same effect, however fast the processes are: stage 0 takes a
    STOP from the notices only after so many batches that a message would have brought it, were there any.

    Args:
        stage: Number of this stage.
        stages: Number of all stages.
        staleness: Number of updates after which a message from above is read.
        notices: The other way.
        unite: Gives what stage 0 of any copy of the pipeline says; None where there is one copy.

    Attributes:
        decided: What all stages do after the batch that this one works on.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        staleness: int,
        notices: Notices | None = None,
        unite: Callable[[int], int] | None = None,
    ) -> None:
        self._stage, self._stages, self._staleness = stage, stages, staleness
        self._notices, self._unite = notices, unite
        self._asked = Ask.NOTHING
        self._waited = 0
        self.decided = Ask.NOTHING

    def ask(self, what: Ask) -> None:
        """Ask all stages; may be called by a signal handler."""
        if what & ~self._asked:
            self._asked |= what
            if self._notices is not None:
                self._notices.ask(int(self._asked))

    @property
    def asked(self) -> Ask:
        """What this stage has asked for, or has heard that another one has."""
        return self._asked

    def begin(self, accumulate: int = 1) -> None:
        """A batch begins; stage 0 decides for it.

        Args:
            accumulate: Batches per update.
        """
        if self._stage:
            return
        noticed = Ask(0 if self._notices is None else self._notices.asked())
        self._waited += bool(noticed & Ask.STOP)
        hop = (self._staleness + 1) * accumulate + 1
        if self._waited <= self._stages * hop + 1:
            noticed &= ~Ask.STOP
        self.decided |= self._asked | noticed
        if self._unite is not None:
            self.decided = Ask(self._unite(int(self.decided)))

    def settle(self, decided: Ask) -> None:
        """All stages have agreed while none of them was in a batch."""
        self.decided |= decided

    def hear(self, said: tuple[float, ...], upwards: bool) -> None:
        """Take note of what came with a message."""
        bits = Ask(int(said[0]))
        if upwards:
            self.decided |= bits
        else:
            self._asked |= bits

    def tell(self, kind: Kind, upwards: bool) -> tuple[float, ...]:
        """What to send with a message of any kind."""
        return (float(self.decided if upwards else self._asked),)
