"""Where a process runs, and whether it still does."""

import os
import signal
import socket
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Condition(Enum):
    """What the operating system says about a process."""

    RUNNING = "runs"
    STOPPED = "is stopped"
    GONE = "does not run any more"
    UNKNOWN = "cannot be seen from here"


class Process(NamedTuple):
    """One process of the pipeline, as the others have to know it.

    Attributes:
        name: What it does, as "Stage 2".
        rank: Its global rank.
        host: Name of its host.
        machine: What only processes that see each other have in common.
        pid: Its number.
        started: When it was started, since numbers are used again.
    """

    name: str
    rank: int
    host: str
    machine: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"{self.name} (rank {self.rank}, host {self.host})"

    def condition(self) -> Condition:
        """Whether it runs; slow is not stopped."""
        if not self.started or self.machine != _machine():
            return Condition.UNKNOWN
        state, started = _state_of(self.pid)
        if not state or state in "ZXx" or started != self.started:
            return Condition.GONE
        return Condition.STOPPED if state in "Tt" else Condition.RUNNING

    def kill(self) -> None:
        """End it; a stopped process cannot do so itself."""
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)


def this_process(name: str, rank: int) -> Process:
    """The process that asks."""
    _, started = _state_of(os.getpid())
    return Process(name, rank, socket.gethostname(), _machine(), os.getpid(), started)


def _machine() -> str:
    """The running system and the name space of its process numbers; containers differ in the second."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """Letter of its state, and when it was started; empty where there is no such process."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
