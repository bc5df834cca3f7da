"""What the processes tell each other about themselves: a store, and the one thread that talks to it.

A store whose server is frozen keeps whoever asks, and does not give up. So nobody else asks it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import NamedTuple, Protocol, runtime_checkable

PERIOD = 0.3
"""Seconds between two heartbeats."""

NEWS = 0.1
"""The same where the process is doing something else by now."""

_ERROR = "error"
_NOTHING = "-"


@runtime_checkable
class Store(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read, in one exchange."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write if the old value is the expected one."""


class Fault(NamedTuple):
    """Why the pipeline stops.

    Attributes:
        rank: Who said it.
        text: The sentences.
    """

    rank: int
    text: str


@dataclass
class Beat:
    """A heartbeat.

    Attributes:
        count: Its number.
        where: What the process was doing.
        left: Whether it needs nobody any more.
        asks: What it asks of all, as bits.
    """

    count: int = 0
    where: str = "start-up"
    left: bool = False
    asks: int = 0


def prepare(store: Store, size: int) -> None:
    """Write every key once, so that reading them never waits."""
    store.set(_ERROR, _NOTHING)
    for rank in range(size):
        store.set(_beat_key(rank), _encode(Beat()))


class Board:
    """This process' view of the store.

    Args:
        store: Whose connection nobody else uses.
        rank: Of this process.
        peers: Whose heartbeats are read.

    Attributes:
        mine: The heartbeat to send next.
        beats: The last heartbeats of the peers.
        fault: The error that came first.
        lost: Why the store cannot be used any more.
        passes: How often everything has been read.
    """

    def __init__(self, store: Store, rank: int, peers: Sequence[int]) -> None:
        self._store, self._rank, self._peers = store, rank, list(peers)
        self._keys = [_ERROR, *map(_beat_key, self._peers)]
        self._outbox: Fault | None = None
        self._wake, self._stopping, self._news = Event(), False, False
        self.mine = Beat()
        self.beats = {rank: Beat() for rank in self._peers}
        self.fault: Fault | None = None
        self.lost: Exception | None = None
        self.passes = 0
        self._thread = Thread(target=self._run, name="dni heartbeat", daemon=True)
        self._thread.start()

    def publish(self, fault: Fault) -> None:
        """Tell everybody, unless another error came first; does not wait."""
        self._outbox = fault
        self._wake.set()

    def tell(self, where: str) -> None:
        """Say what this process is doing; others hear of it soon."""
        self.mine.where = where
        self._news = True

    def refresh(self) -> None:
        """Read and write now; does not wait."""
        self._wake.set()

    def stop(self, seconds: float) -> bool:
        """Read and write for the last time; whether that was done in time."""
        self._stopping = True
        self._wake.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            last = False
            while not last:
                last = self._stopping
                self._wake.clear()
                self._news = False
                self._exchange()
                self._rest()
        except Exception as lost:
            self.lost = lost

    def _rest(self) -> None:
        for _ in range(round(PERIOD / NEWS)):
            if self._stopping or self._wake.wait(NEWS) or self._news:
                break

    def _exchange(self) -> None:
        self.mine.count += 1
        self._store.set(_beat_key(self._rank), _encode(self.mine))
        if self._outbox is not None and self.fault is None:
            self._store.compare_set(_ERROR, _NOTHING, json.dumps(self._outbox))
        error, *beats = (value.decode() for value in self._store.multi_get(self._keys))
        self.beats = {r: Beat(**json.loads(b)) for r, b in zip(self._peers, beats, strict=True)}
        if error != _NOTHING:
            self.fault = Fault(*json.loads(error))
        self.passes += 1


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _encode(beat: Beat) -> str:
    return json.dumps(vars(beat))
