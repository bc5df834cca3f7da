"""In which order a stage runs forward and backward passes on the microbatches of one batch."""

from typing import NamedTuple

from lightning_dni.errors import StageError

EXACT = ("gpipe", "1f1b")
"""The schedules of exact backprop."""


class Pass(NamedTuple):
    """One microbatch's way through one stage, up or down."""

    microbatch: int
    backward: bool


class Turn(NamedTuple):
    """A pass, and the stage that runs it."""

    stage: int
    passed: Pass


def check_schedule(schedule: str, microbatches: int) -> None:
    """See that a schedule of exact backprop can be run.

    Raises:
        StageError: It is none, or `microbatches` is not a positive integer.
    """
    if schedule not in EXACT:
        raise StageError(
            f"Expected `schedule` to be one of {EXACT} for exact backprop, but got {schedule!r}. Pass "
            "'1f1b', which keeps the fewest activations."
        )
    if not is_count(microbatches):
        raise StageError(
            f"Expected `microbatches` to be an integer of at least 1, but got {microbatches!r}. Pass a few "
            "times the number of stages, and at most the rows of a batch."
        )


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Number of microbatches that a stage has run forward before it runs the first one backward.

    >>> [in_flight("1f1b", stage, stages=3, microbatches=8) for stage in range(3)]
    [3, 2, 1]
    """
    return microbatches if schedule == "gpipe" else min(microbatches, stages - stage)


def order(schedule: str, stage: int, stages: int, microbatches: int) -> list[Pass]:
    """All passes of one stage. Gradients add up from the first microbatch to the last in every schedule.

    >>> "".join("FB"[p.backward] for p in order("1f1b", stage=0, stages=2, microbatches=4))
    'FFBFBFBB'
    """
    ahead = in_flight(schedule, stage, stages, microbatches)
    passes = [Pass(i, backward=False) for i in range(ahead)]
    for i in range(microbatches):
        passes.append(Pass(i, backward=True))
        if ahead + i < microbatches:
            passes.append(Pass(ahead + i, backward=False))
    return passes


def turns(schedule: str, stages: int, microbatches: int) -> list[Turn]:
    """All passes of all stages, in an order in which each finds what it needs already there."""
    left = [order(schedule, stage, stages, microbatches)[::-1] for stage in range(stages)]
    done: set[Turn] = set()
    taken: list[Turn] = []
    while any(left):
        for stage, passes in enumerate(left):
            if passes and _is_ready(Turn(stage, passes[-1]), stages, done):
                taken.append(Turn(stage, passes.pop()))
                done.add(taken[-1])
    return taken


def _is_ready(turn: Turn, stages: int, done: set[Turn]) -> bool:
    neighbour = turn.stage + 1 if turn.passed.backward else turn.stage - 1
    return not 0 <= neighbour < stages or Turn(neighbour, turn.passed) in done
