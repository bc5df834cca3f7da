"""Which other process is dead, frozen or out of reach; nothing that is only slow.

A call that holds the interpreter's lock stops heartbeats too, so on the same machine the operating system is
asked, and on another one a beacon; only where no beacon was ever seen are far processes judged by their
silence.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_dni.pipeline.beacon import Lookout
from lightning_dni.pipeline.board import Board
from lightning_dni.pipeline.process import Condition, Process

FEW = 32
"""So many processes all watch each other; more watch their neighbours only."""


class Limits(NamedTuple):
    """Seconds after which something is done.

    Attributes:
        silence: Without a heartbeat, until a stopped process on this machine is ended; without an answer,
            until a beacon or a store on another machine is given up.
        far_silence: Without a heartbeat, until a process on another machine is taken for dead whose beacon
            was never seen.
        patience: Between a lost connection and naming it as the cause.
        grace: Between an error elsewhere and ending this process, where the training thread stays away.
        farewell: The same where the training thread knows of the error.
    """

    silence: float = 5.0
    far_silence: float = 60.0
    patience: float = 2.0
    grace: float = 3.0
    farewell: float = 60.0


class Verdict(NamedTuple):
    """What is wrong.

    Attributes:
        text: A sentence.
        frozen: A process that has to be killed, since it cannot end itself.
    """

    text: str
    frozen: Process | None = None


class Judge:
    """Judges by what it sees at regular looks.

    Args:
        rank: Of this process.
        peers: Whom it judges.
        processes: All of them, by rank.
        limits: Seconds after which something is done.
        board: Their heartbeats.
        lookout: The beacons of other machines.

    Attributes:
        processes: All of them, by rank.
    """

    def __init__(
        self,
        rank: int,
        peers: Sequence[int],
        processes: Sequence[Process],
        limits: Limits,
        board: Board,
        lookout: Lookout,
    ) -> None:
        self.processes = list(processes)
        self._rank, self._peers, self._limits = rank, peers, limits
        self._board, self._lookout = board, lookout
        self._silent = dict.fromkeys(peers, 0.0)
        self._heard = dict.fromkeys(peers, 0)
        self._stale, self._passes = 0.0, 0
        self._unanswered, self._calling = 0.0, lookout.calling
        self._gone_at: dict[int, int] = {}

    def look(self, seconds: float) -> Verdict | None:
        """What is wrong, if anything is.

        Args:
            seconds: Since the last look, as far as this process was there itself.
        """
        self._count(seconds)
        board = self._board
        if self._rank != 0 and not board.beats[0].left:
            found = self._judge_store()
            if found is not None:
                return found
        for rank in self._peers:
            if board.beats[rank].left:
                self._lookout.forget(rank)
            else:
                found = self._judge_peer(rank)
                if found is not None:
                    return found
        return None

    def unheard(self, seconds: float) -> list[Process]:
        """Whose heartbeats have not come for so long; who keeps the store, where nobody's can come."""
        if self._rank != 0 and self._stale >= seconds:
            return [self.processes[0]]
        return [self.processes[rank] for rank, silent in self._silent.items() if silent >= seconds]

    def _count(self, seconds: float) -> None:
        passes, calling = self._board.passes, self._lookout.calling
        self._stale = self._stale + seconds if passes == self._passes else 0.0
        self._unanswered = self._unanswered + seconds if calling == self._calling else 0.0
        self._passes, self._calling = passes, calling
        for rank in self._peers:
            count = self._board.beats[rank].count
            if count != self._heard[rank]:
                self._silent[rank] = 0.0
            elif not self._stale:  # else nobody can be heard
                self._silent[rank] += seconds
            self._heard[rank] = count

    def _judge_store(self) -> Verdict | None:
        """Whether who keeps the store is dead."""
        lost = self._board.lost
        if lost is None and self._stale <= self._limits.silence:
            return None
        found = self._judge(0, self._stale)
        if found is None and lost is not None and self._stale > self._limits.silence:
            found = Verdict(f"{self.processes[0]} cannot be reached: {lost}.")
        return found

    def _judge_peer(self, rank: int) -> Verdict | None:
        gone = self.processes[rank].condition() is Condition.GONE or rank in self._lookout.lost
        if gone:  # its last word comes first: the board has to be read once more
            first = self._gone_at.setdefault(rank, self._board.passes)
            self._board.refresh()
            gone = self._board.passes > first
        if not gone and self._silent[rank] <= self._limits.silence:
            return None
        return self._judge(rank, self._silent[rank])

    def _judge(self, rank: int, silent: float) -> Verdict | None:
        process = self.processes[rank]
        condition, heard = process.condition(), f"last heard of in {self._board.beats[rank].where}"
        found = f"its process {process.pid} {condition.value}"
        if condition is Condition.GONE:
            return Verdict(f"{process} is gone: {found}, {heard}.")
        if condition is Condition.STOPPED and silent > self._limits.silence:
            text = (
                f"{process} is frozen: {found} and sends no heartbeat for {silent:.0f} s, {heard}; "
                "it was killed."
            )
            return Verdict(text, process)
        if condition is Condition.UNKNOWN:
            why = self._far(rank, silent)
            if why is not None:
                return Verdict(f"{process} is dead or cannot be reached: {why}, {heard}.")
        return None

    def _far(self, rank: int, silent: float) -> str | None:
        """Why a process on another machine is dead or out of reach, if it is."""
        lookout, limit = self._lookout, self._limits.silence
        if rank in lookout.lost:
            return f"its connection was lost ({lookout.lost[rank]})"
        if rank == 0 and self._stale > limit:  # its store answers, whatever Python does there
            return f"no answer for {self._stale:.0f} s"
        if rank in lookout.seen:
            waiting = rank == self._calling[1] and self._unanswered > limit
            return f"no answer for {self._unanswered:.0f} s" if waiting else None
        return f"no heartbeat for {silent:.0f} s" if silent > self._limits.far_silence else None


def peers_of(rank: int, size: int) -> list[int]:
    """Whom to watch; rank 0 keeps the store and has to know about all, and all about it."""
    if rank == 0 or size <= FEW:
        return [r for r in range(size) if r != rank]
    around: Iterable[int] = (0, rank - 2, rank - 1, rank + 1, rank + 2)
    return sorted({r % size for r in around} - {rank})
