"""A thread beside the one that trains: it knows when another stage has failed, died or frozen.

Whom it takes for dead is decided in `judge.py`; here the others are told, and this process is ended in time.
"""

import atexit
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import reduce
from operator import or_
from queue import Empty, SimpleQueue
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_dni.errors import StageError
from lightning_dni.pipeline.beacon import Address, Beacon, Lookout
from lightning_dni.pipeline.board import PERIOD, Board, Fault, Store, prepare
from lightning_dni.pipeline.judge import Judge, Limits, peers_of
from lightning_dni.pipeline.process import Condition, Process, this_process

T = TypeVar("T")

LONGEST = 40
"""Lines of a traceback that are told."""

CALL = "dni call"
"""Name of a thread that waits for other processes."""

TICK = 0.1
REMEDY = "Every stage stops; see the log of that one, and start again from the last checkpoint."


def open_watch(name: str, limits: Limits = Limits()) -> "Watch":  # noqa: B008
    """Start to watch; every process of the default group calls it.

    Args:
        name: What this process does, as "Stage 2".
        limits: Seconds after which something is done.

    Raises:
        StageError: This process still waits for what an error has ended.
    """
    if any(thread.name == CALL for thread in enumerate_threads()):
        raise StageError(
            "Expected a process that waits for nobody, but after an error in another stage this one still "
            "waits for it, so it cannot train again. Start all processes anew, from the last checkpoint."
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    timeout = timedelta(seconds=max(30.0, limits.far_silence))
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    store, port = None, 0
    if rank == 0:
        store = _store(host, 0, timeout, is_master=True)
        prepare(store, size)
        port = store.port
    said: list[Any] = [None] * size
    dist.all_gather_object(said, (tuple(this_process(name, rank)), host, port))
    if store is None:
        _, host, port = said[0]
        store = _store(host, port, timeout)
    processes = [Process(*process) for process, _, _ in said]
    beacon, beacons = _beacons(rank, processes, host)
    return Watch(store, rank, processes, limits, beacon, beacons)


def _beacons(rank: int, processes: Sequence[Process], host: str) -> tuple[Beacon | None, dict[int, Address]]:
    """This process's beacon, where there are several machines, and those that it looks out for."""
    if len({process.machine for process in processes}) == 1:
        return None, {}
    beacon = Beacon(host)
    said: list[Any] = [None] * len(processes)
    dist.all_gather_object(said, tuple(beacon.address))
    far = (p.rank for p in processes if rank == 0 and p.machine != processes[0].machine)
    return beacon, {rank: Address(*said[rank]) for rank in far}


def _store(host: str, port: int, timeout: timedelta, is_master: bool = False) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )


class Watch:
    """What one process knows of the others.

    Args:
        store: A connection that nobody else uses, to a store that rank 0 keeps.
        rank: Of this process.
        processes: All of them, by rank.
        limits: Seconds after which something is done.
        beacon: Answers for this process.
        beacons: Those of processes on other machines, by rank.

    Attributes:
        where: What the training thread is doing, as "step 15".
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        processes: Sequence[Process],
        limits: Limits,
        beacon: Beacon | None = None,
        beacons: Mapping[int, Address] = MappingProxyType({}),
    ) -> None:
        self._rank, self._limits, self._beacon, self._lookout = rank, limits, beacon, Lookout(beacons)
        self._pid = os.getpid()
        peers = peers_of(rank, len(processes))
        self._board = Board(store, rank, peers)
        self._judge = Judge(rank, peers, processes, limits, self._board, self._lookout)
        self._fault: Fault | None = None
        self._known_since = self._told_since = 0.0
        self._told = False
        self._closing = Event()
        self._thread = Thread(target=self._run, name="dni watch", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @property
    def where(self) -> str:
        """What the training thread is doing."""
        return self._board.mine.where

    @where.setter
    def where(self, where: str) -> None:
        self._board.tell(where)

    # ---- for the training thread

    def rename(self, names: Sequence[str]) -> None:
        """Say what each process does, by rank, where that was not known at first."""
        pairs = zip(self._judge.processes, names, strict=True)
        self._judge.processes = [process._replace(name=name) for process, name in pairs]

    def ask(self, asked: int) -> None:
        """Tell all processes, with the next heartbeats, that this one asks for something."""
        self._board.mine.asks |= asked
        self._board.refresh()

    def asked(self) -> int:
        """What any process is known to have asked for."""
        return reduce(or_, (beat.asks for beat in self._board.beats.values()), self._board.mine.asks)

    def check(self) -> None:
        """Return at once where nothing is known to be wrong.

        Raises:
            StageError: A stage has failed, died or frozen.
        """
        if self._fault is not None:
            raise self._error()

    def report(self, exception: BaseException) -> StageError | None:
        """Tell all others why this process stops; what only follows from another error is not told.

        Returns:
            What is behind a lost connection, where that is known.
        """
        lost = _is_connection_error(exception)
        if lost:
            self._await_fault(self._limits.patience)
        known = self._fault is not None
        if not known:
            said = f"{type(exception).__name__}: {str(exception).strip()}".rstrip(".: ")
            me = self._judge.processes[self._rank]
            heard = self._unheard() if lost else ""
            self._publish(
                f"{me} failed in {self.where}: {said}.{heard} {REMEDY}\nThat stage says:\n{_trace(exception)}"
            )
        error = self._error()
        return error if lost and known else None

    def blame(self, symptom: Exception) -> StageError:
        """The error to raise where a connection was lost: the cause, if it becomes known soon."""
        self._await_fault(self._limits.patience)
        if self._fault is None:
            me = self._judge.processes[self._rank]
            self._publish(f"{me} noticed in {self.where}: {str(symptom).strip()}{self._unheard()} {REMEDY}")
        return self._error()

    def _unheard(self) -> str:
        """Who may be behind a lost connection of which torch.distributed says no more than a port."""
        silent = ", ".join(map(str, self._judge.unheard(self._limits.patience / 2)))
        return f" No heartbeat comes from {silent} any more." if silent else ""

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, which waits for other processes; on a thread of its own.

        Raises:
            StageError: A stage has stopped meanwhile.
        """
        outcome: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        Thread(target=_call, args=(function, device, outcome), name=CALL, daemon=True).start()
        while True:
            with suppress(Empty):
                done, value = outcome.get(timeout=TICK)
                break
            self.check()
        if done:
            return value  # type: ignore[no-any-return]
        if _is_connection_error(value):
            raise self.blame(value) from value
        raise value

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective on CPUs.

        Raises:
            StageError: A stage has stopped meanwhile.
        """
        self.call(work.wait)

    def close(self, seconds: float = 5.0) -> None:
        """Stop to watch. Rank 0 waits for a while until the others need its store no more."""
        if self._closing.is_set() or os.getpid() != self._pid:
            return
        self._closing.set()
        self._lookout.close()
        atexit.unregister(self._at_exit)
        self._thread.join(seconds)
        self._board.mine.left = True
        self._board.refresh()
        if self._rank == 0:
            self._await_others(seconds)
        self._board.stop(1.0)
        if self._beacon is not None:
            self._beacon.put_out()

    def _at_exit(self) -> None:
        """Nobody has closed it: the script was left by an exception, or forgot to."""
        uncaught = getattr(sys, "last_value", None)
        if uncaught is not None and os.getpid() == self._pid:
            self.report(uncaught)
        self.close()

    def _await_others(self, seconds: float) -> None:
        """Keep the store until every other process has left, or has read that this one leaves."""
        counts = {rank: beat.count for rank, beat in self._board.beats.items()}
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(self._needs_me(*pair) for pair in counts.items()):
            self._board.refresh()
            time.sleep(PERIOD / 6)

    def _needs_me(self, rank: int, count: int) -> bool:
        beat = self._board.beats[rank]
        # the exchange in which this count was read may have been over before; two more cannot
        has_read = beat.count > count + 2
        running = self._judge.processes[rank].condition() in (Condition.RUNNING, Condition.UNKNOWN)
        return running and not (beat.left or has_read or self._board.lost)

    # ---- errors

    def _error(self) -> StageError:
        assert self._fault is not None
        if not self._told:
            self._told, self._told_since = True, time.monotonic()
        return StageError(self._fault.text)

    def _await_fault(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._fault is None and time.monotonic() < until:
            time.sleep(TICK / 4)

    def _publish(self, text: str) -> None:
        """Tell all others, unless somebody was first; whoever was first is believed here too."""
        fault = Fault(self._rank, text)
        until = time.monotonic() + 1.0
        self._board.publish(fault)
        while not (self._board.fault or self._board.lost) and time.monotonic() < until:
            time.sleep(TICK / 10)
        self._learn(self._board.fault or fault)

    def _learn(self, fault: Fault) -> None:
        if self._fault is None:
            self._known_since = time.monotonic()
            self._fault = fault

    # ---- the thread

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(PERIOD):
            now = time.monotonic()
            if self._rank == 0:  # whom all listen to
                self._board.mine.asks = self.asked()
            if self._fault is None:
                # only what this thread was there to see counts: it may have been kept away itself
                self._look(min(now - before, 2 * PERIOD))
            else:
                self._leave_in_time(now)
            before = now

    def _look(self, seconds: float) -> None:
        if self._board.fault is not None:
            self._learn(self._board.fault)
            return
        verdict = self._judge.look(seconds)
        if verdict is not None:
            self._publish(f"{verdict.text} {REMEDY}")
            if verdict.frozen is not None:
                verdict.frozen.kill()

    def _leave_in_time(self, now: float) -> None:
        """End a process whose training thread is stuck, as in a collective that never ends."""
        assert self._fault is not None
        if self._told:
            overdue = now - self._told_since > self._limits.farewell
        else:
            overdue = now - self._known_since > self._limits.grace
        if overdue:
            stuck = f"The training thread was stuck in {self.where}, so this process ends here."
            os.write(2, f"{self._fault.text}\n{stuck}\n".encode())
            os._exit(1)


def _call(function: Callable[[], Any], device: int | None, outcome: SimpleQueue[tuple[bool, Any]]) -> None:
    try:
        if device is not None:
            torch.cuda.set_device(device)
        outcome.put((True, function()))
    except BaseException as error:
        outcome.put((False, error))


def _trace(exception: BaseException) -> str:
    """The end of a traceback."""
    lines = "".join(traceback.format_exception(exception)).splitlines()
    return "\n".join(lines[-LONGEST:])


def _is_connection_error(error: BaseException) -> bool:
    """Whether torch.distributed has lost somebody, which is never the first thing that went wrong."""
    if isinstance(error, StageError):  # it says what went wrong
        return False
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    signs = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
