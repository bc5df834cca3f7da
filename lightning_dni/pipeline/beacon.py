"""Whether processes on other machines are still there: each keeps a server that answers without Python.

A heartbeat stops where a long call holds the interpreter's lock; the server of a store of torch.distributed
does not. It stops with its process, frozen or dead, and with its link.
"""

import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, NamedTuple

import torch.distributed as dist

PERIOD = 0.3
"""Seconds between two calls to the same beacon, at least."""


class Address(NamedTuple):
    """Where a beacon answers.

    Attributes:
        host: As other machines know it.
        port: Its port.
    """

    host: str
    port: int


class Beacon:
    """Answers for this process, from a thread that needs no interpreter, until it is put out.

    Args:
        towards: A host that the callers can reach, or are on.
    """

    def __init__(self, towards: str) -> None:
        self._store: Any = _store("localhost", 0, is_master=True)
        self.address = Address(_own_address(towards), self._store.port)

    def put_out(self) -> None:
        """Answer no more."""
        self._store = None


class Lookout:
    """Calls the beacons of other machines in turn, on a thread of its own, since a call may never end.

    Args:
        beacons: Their addresses by rank.

    Attributes:
        calling: How many calls were made, and to whom the last one is; it ends, or the next does not come.
        seen: Who has ever answered. Of others nothing is known.
        lost: Why a beacon that has been seen does not answer any more.
    """

    def __init__(self, beacons: Mapping[int, Address]) -> None:
        self.calling: tuple[int, int | None] = (0, None)
        self.seen: set[int] = set()
        self.lost: dict[int, Exception] = {}
        self._beacons = dict(beacons)
        self._stores: dict[int, Any] = {}
        self._forgotten: set[int] = set()
        self._closing = Event()
        if beacons:
            Thread(target=self._run, name="dni lookout", daemon=True).start()

    def forget(self, rank: int) -> None:
        """Call this one no more."""
        self._forgotten.add(rank)

    def close(self) -> None:
        """Call nobody any more; does not wait."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD):
            for rank in self._beacons:
                if rank not in self.lost and rank not in self._forgotten and not self._closing.is_set():
                    self.calling = self.calling[0] + 1, rank
                    self._call(rank)
            self.calling = self.calling[0] + 1, None

    def _call(self, rank: int) -> None:
        try:
            if rank not in self._stores:
                self._stores[rank] = _store(*self._beacons[rank])
            self._stores[rank].num_keys()
            self.seen.add(rank)
        except Exception as error:
            self._stores.pop(rank, None)
            if rank in self.seen:
                self.lost[rank] = error


def _store(host: str, port: int, is_master: bool = False) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=30)
    )


def _own_address(towards: str) -> str:
    """The address from which packets to `towards` leave; none is sent."""
    with suppress(OSError):
        family, kind, *_, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asked:
            asked.connect(address)
            return str(asked.getsockname()[0])
    return socket.gethostname()
