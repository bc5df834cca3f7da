"""The two ends of a way between two processes: first in, first out, and a bounded number under way.

Waiting for a peer can be neither polled nor cancelled on gloo. So helper threads wait, one per end, while
the thread that trains waits for them only, and asks in between whether the other stages still run.
"""

import atexit
import os
import re
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread

from lightning_dni.errors import StageError
from lightning_dni.pipeline.guard import Guard
from lightning_dni.pipeline.header import Flag, Header
from lightning_dni.pipeline.message import Message
from lightning_dni.pipeline.wire import Parcel, Wire

TICK = 0.1
"""Seconds between two looks at the guard."""

FAREWELL = 60.0
"""Seconds that closing waits for the other end."""

PARTING = 0.5
"""The same where something has failed."""


class _End:
    """What both ends have in common: a helper thread, and a way to be rid of it."""

    def __init__(self, wire: Wire, name: str, guard: Guard, target: Callable[[], None]) -> None:
        self._wire, self._name, self._guard = wire, name, guard
        self._pid, self._closed = os.getpid(), False
        self._thread = Thread(target=target, name=f"dni {name}", daemon=True)
        self._thread.start()
        atexit.register(self.close, failed=True)

    def close(self, failed: bool = False, seconds: float = FAREWELL) -> None:
        """Close this end, in whatever state it is; may be called again.

        Args:
            failed: Whether this stage stops because of an error.
            seconds: How long to wait for the other end.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._say_goodbye(failed)
        until = time.monotonic() + (min(seconds, PARTING) if failed else seconds)
        while self._thread.is_alive() and time.monotonic() < until and not self._is_hopeless():
            self._thread.join(TICK)
        if self._thread.is_alive():
            # a helper that wakes up while the interpreter ends would abort the process
            self._wire.sever()
            self._thread.join(PARTING)
        if not self._thread.is_alive():
            self._wire.cut()

    def _say_goodbye(self, failed: bool) -> None:
        raise NotImplementedError

    def _is_hopeless(self) -> bool:
        try:
            self._guard.check()
        except StageError:
            return True
        return False


class SendChannel(_End):
    """The end that sends.

    Args:
        wire: What carries the messages.
        name: What is sent and to whom, for errors.
        window: Messages that may be under way.
        guard: Who knows about the other stages.
    """

    def __init__(self, wire: Wire, name: str, window: int, guard: Guard) -> None:
        self._slots = Semaphore(window)
        self._under_way: SimpleQueue[Parcel | None] = SimpleQueue()
        self._broken: Exception | None = None
        self._ended = False
        super().__init__(wire, name, guard, self._finish)

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

    def _say_goodbye(self, failed: bool) -> None:
        self.end(failed)


class ReceiveChannel(_End):
    """The end that receives.

    Args:
        wire: What carries the messages.
        name: What is received and from whom, for errors.
        window: Messages that may wait here.
        guard: Who knows about the other stages.
    """

    def __init__(self, wire: Wire, name: str, window: int, guard: Guard) -> None:
        self._slots = Semaphore(window)
        self._arrived: SimpleQueue[Message | Flag | Exception] = SimpleQueue()
        self._closing = False
        super().__init__(wire, name, guard, self._pump)

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
            while (header := self._take_header()).flag == Flag.MESSAGE:
                tensors = self._wire.take_tensors(header)
                if not self._closing:
                    self._arrived.put(
                        Message(header.step, header.kind, tensors, header.fingerprint, header.facts)
                    )
                del tensors
            self._arrived.put(header.flag)
        except Exception as lost:
            self._arrived.put(lost)

    def _take_header(self) -> Header:
        """The next header, once there is room for its message: what nobody receives stays with the sender."""
        if not self._closing:
            self._slots.acquire()
        return self._wire.take_header()

    def _say_goodbye(self, failed: bool) -> None:
        """From now on drop what comes; the other end may still have to get rid of it."""
        self._closing = True
        self._slots.release()


def _lost(doing: str, error: Exception) -> StageError:
    if isinstance(error, StageError):
        return error
    return StageError(f"Lost the connection while {doing}; see the log of that stage. ({_line(error)})")


def _line(error: Exception) -> str:
    """What gloo says, without the place in its source and its advice."""
    said = re.sub(r"^\[\S*\] *", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said.split('. ')[0][:160]}"
