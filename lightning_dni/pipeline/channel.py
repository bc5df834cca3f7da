"""The two ends of a way between two processes: first in, first out, and a bounded number under way.

Waiting for a peer can be neither polled nor cancelled on gloo. So helper threads wait, one per end, while
the thread that trains waits for them only, and asks in between whether the other stages still run.
"""

import re
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread

from lightning_dni.errors import StageError
from lightning_dni.pipeline.guard import Guard
from lightning_dni.pipeline.header import Flag, Header
from lightning_dni.pipeline.message import Message
from lightning_dni.pipeline.wire import Parcel, Wire

TICK = 0.1
"""Seconds between two looks at the guard."""

FAREWELL = 5.0
"""Seconds that closing waits for the other end."""


class SendChannel:
    """The end that sends.

    Args:
        wire: What carries the messages.
        name: What is sent and to whom, for errors.
        window: Messages that may be under way.
        guard: Who knows about the other stages.
    """

    def __init__(self, wire: Wire, name: str, window: int, guard: Guard) -> None:
        self._wire, self._name, self._guard = wire, name, guard
        self._slots = Semaphore(window)
        self._under_way: SimpleQueue[Parcel | None] = SimpleQueue()
        self._broken: Exception | None = None
        self._ended = False
        self._thread = Thread(target=self._finish, name=f"dni sends {name}", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Hand a message over; waits only while `window` messages are under way.

        The tensors must not be changed afterwards.

        Raises:
            StageError: Another stage has stopped, or this end is closed.
        """
        if self._ended:
            raise StageError(
                f"Expected an open way for {self._name}, but it is closed. Connect the stages anew."
            )
        self._look()
        while not self._slots.acquire(timeout=TICK):
            self._look()
        header = Header(Flag.MESSAGE, message.step, message.kind, message.fingerprint, (), message.facts)
        try:
            self._under_way.put(self._wire.post(header, message))
        except StageError:
            self._slots.release()
            raise
        except RuntimeError as lost:
            self._broken = lost
            self._look()

    def _look(self) -> None:
        self._guard.check()
        if self._broken is not None:
            raise self._guard.blame(_lost(f"sending {self._name}", self._broken)) from self._broken

    def _finish(self) -> None:
        try:
            while (parcel := self._under_way.get()) is not None:
                self._wire.finish(parcel)
                del parcel
                self._slots.release()
        except Exception as lost:
            self._broken = lost

    def end(self, failed: bool = False) -> None:
        """Tell the other end that nothing more comes; does not wait."""
        if self._ended:
            return
        self._ended = True
        if self._broken is None:
            try:
                self._under_way.put(self._wire.post(Header(Flag.FAILED if failed else Flag.END)))
            except RuntimeError as lost:
                self._broken = lost
        self._under_way.put(None)

    def close(self, failed: bool = False, seconds: float = FAREWELL) -> None:
        """End it, and wait for a while until everything has arrived."""
        self.end(failed)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self._wire.cut()


class ReceiveChannel:
    """The end that receives.

    Args:
        wire: What carries the messages.
        name: What is received and from whom, for errors.
        window: Messages that may wait here.
        guard: Who knows about the other stages.
    """

    def __init__(self, wire: Wire, name: str, window: int, guard: Guard) -> None:
        self._wire, self._name, self._guard = wire, name, guard
        self._slots = Semaphore(window)
        self._arrived: SimpleQueue[Message | Flag | Exception] = SimpleQueue()
        self._closing = False
        self._thread = Thread(target=self._pump, name=f"dni receives {name}", daemon=True)
        self._thread.start()

    def receive(self) -> Message:
        """The next message, in the order in which they were sent; waits for it.

        Raises:
            StageError: Another stage has stopped, or has sent its last message.
        """
        self._guard.check()
        while True:
            try:
                arrived = self._arrived.get(timeout=TICK)
                break
            except Empty:
                self._guard.check()
        if isinstance(arrived, Message):
            self._slots.release()
            self._wire.adopt(arrived.tensors)
            return arrived
        self._arrived.put(arrived)  # for whoever asks again
        raise self._refusal(arrived)

    def _refusal(self, arrived: Flag | Exception) -> StageError:
        if arrived == Flag.END:
            return StageError(
                f"Expected more {self._name}, but that stage has sent its last message. Give every stage the "
                "same number of batches."
            )
        if arrived == Flag.FAILED:
            return self._guard.blame(StageError(f"No more {self._name}: that stage has failed; see its log."))
        assert isinstance(arrived, Exception)
        error = self._guard.blame(_lost(f"receiving {self._name}", arrived))
        error.__cause__ = arrived
        return error

    def _pump(self) -> None:
        try:
            while (header := self._wire.take_header()).flag == Flag.MESSAGE:
                if not self._closing:
                    self._slots.acquire()
                tensors = self._wire.take_tensors(header)
                if not self._closing:
                    self._arrived.put(
                        Message(header.step, header.kind, tensors, header.fingerprint, header.facts)
                    )
                del tensors
            self._arrived.put(header.flag)
        except Exception as lost:
            self._arrived.put(lost)

    def close(self, seconds: float = FAREWELL) -> None:
        """Drop whatever still comes, and wait for a while for the other end to close."""
        self._closing = True
        self._slots.release()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self._wire.cut()


def _lost(doing: str, error: Exception) -> StageError:
    if isinstance(error, StageError):
        return error
    return StageError(f"Lost the connection while {doing}; see the log of that stage. ({_line(error)})")


def _line(error: Exception) -> str:
    """What gloo says, without the place in its source and its advice."""
    said = re.sub(r"^\[\S*\] *", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said.split('. ')[0][:160]}"
