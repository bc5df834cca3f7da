"""What a stage spends its time on, by the clock of its host: cheap enough to be always on.

On an accelerator it is the time of the process: what a kernel takes is seen where the process waits for it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from time import perf_counter
from typing import NamedTuple

from lightning_dni.core.profile import Profile, no_profile
from lightning_dni.core.report import Utilization
from lightning_dni.pipeline.message import Inlet, Links, Message, Outlet


class Activity(Enum):
    """What a stage does; OTHER is everything outside of a pass: data loading, logging, other callbacks."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer step"
    ESTIMATOR = "estimator step"
    WAIT_IN = "waits for input"
    WAIT_OUT = "waits to send"
    OTHER = "other"


BUSY = (Activity.FORWARD, Activity.BACKWARD, Activity.OPTIMIZER, Activity.ESTIMATOR)

PHASES = {
    "pipeline.forward": Activity.FORWARD,
    "pipeline.backward": Activity.BACKWARD,
    "dni.local_backward": Activity.BACKWARD,
    "dni.probe": Activity.BACKWARD,
    "dni.estimator_step": Activity.ESTIMATOR,
}
"""What the phases are that an engine names to a profiler."""


class Span(NamedTuple):
    """A stretch of time, in seconds of the host's clock, and the training batch that it belongs to."""

    start: float
    end: float
    activity: Activity
    step: int


class StageClock:
    """Adds up what the time goes to; an activity inside another one interrupts it.

    Attributes:
        step: Number of the training batch in work.
        spans: What was recorded; None where nothing is.
    """

    def __init__(self) -> None:
        self._stack = [Activity.OTHER]
        self._since = perf_counter()
        self._totals = dict.fromkeys(Activity, 0.0)
        self.step = 0
        self.spans: list[Span] | None = None

    @contextmanager
    def doing(self, activity: Activity) -> Iterator[None]:
        """Time what runs inside."""
        self._switch()
        self._stack.append(activity)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def was(self, activity: Activity) -> None:
        """Count everything since the last activity ended as this one."""
        self._switch(activity)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count and record nothing of what runs inside."""
        self._switch()
        kept, spans = dict(self._totals), self.spans
        self.spans = None
        try:
            yield
        finally:
            self._switch()
            self._totals, self.spans = kept, spans

    def _switch(self, activity: Activity | None = None) -> None:
        now = perf_counter()
        ended = activity or self._stack[-1]
        self._totals[ended] += now - self._since
        if self.spans is not None:
            self.spans.append(Span(self._since, now, ended, self.step))
        self._since = now

    def record(self) -> None:
        """Begin to keep every stretch of time."""
        self._switch()
        self.spans = []

    def take(self) -> list[Span]:
        """What was recorded, which ends here."""
        self._switch()
        spans, self.spans = self.spans or [], None
        return spans

    def restart(self) -> None:
        """Begin to add up anew."""
        self._switch()
        self._totals = dict.fromkeys(Activity, 0.0)

    def read(self) -> Utilization:
        """What the time since the last restart has gone to."""
        self._switch()
        totals = self._totals
        busy = sum(totals[activity] for activity in BUSY)
        whole = sum(totals.values())
        return Utilization(busy, totals[Activity.WAIT_IN], totals[Activity.WAIT_OUT], whole)

    def around(self, profile: Profile = no_profile) -> Profile:
        """A profile that tells this clock, too, what is done."""

        def timed(name: str) -> AbstractContextManager[object]:
            activity = PHASES.get(name)
            return profile(name) if activity is None else self._both(activity, profile(name))

        return timed

    @contextmanager
    def _both(self, activity: Activity, profiled: AbstractContextManager[object]) -> Iterator[None]:
        with profiled, self.doing(activity):
            yield

    def watch(self, links: Links) -> Links:
        """Ends of the same ways, the waiting at which is timed."""
        ends = {name: end and _Watched(end, self) for name, end in links._asdict().items()}
        return Links(**ends)


class _Watched:
    """An end whose waits are timed; either kind."""

    def __init__(self, end: Inlet | Outlet, clock: StageClock) -> None:
        self._send: Callable[[Message], None] | None = getattr(end, "send", None)
        self._receive: Callable[[], Message] | None = getattr(end, "receive", None)
        self._clock = clock

    def send(self, message: Message) -> None:
        assert self._send is not None
        with self._clock.doing(Activity.WAIT_OUT):
            self._send(message)

    def receive(self) -> Message:
        assert self._receive is not None
        with self._clock.doing(Activity.WAIT_IN):
            return self._receive()
