"""Schedules of exact backprop: complete, never waiting for themselves, and as fast as they can be."""

import pytest
from core.nets import unchecked

from lightning_dni.errors import StageError
from lightning_dni.pipeline.schedule import EXACT, Pass, Turn, check_schedule, in_flight, order, turns

SIZES = [(stages, microbatches) for stages in range(1, 6) for microbatches in range(1, 10)]

everywhere = pytest.mark.parametrize(("stages", "microbatches"), SIZES)
either = pytest.mark.parametrize("schedule", EXACT)


def text(schedule, stage, stages, microbatches):
    return " ".join(f"{'FB'[p.backward]}{p.microbatch}" for p in order(schedule, stage, stages, microbatches))


def test_one_forward_one_backward_by_hand():
    assert [text("1f1b", k, stages=3, microbatches=4) for k in range(3)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert text("1f1b", 0, stages=4, microbatches=2) == "F0 F1 B0 B1"


def test_all_forward_all_backward_by_hand():
    assert text("gpipe", 0, stages=3, microbatches=3) == "F0 F1 F2 B0 B1 B2"
    assert text("gpipe", 2, stages=3, microbatches=3) == "F0 F1 F2 B0 B1 B2"


@either
@everywhere
def test_every_stage_runs_every_microbatch_up_and_then_down_in_order(schedule, stages, microbatches):
    for stage in range(stages):
        passes = order(schedule, stage, stages, microbatches)
        for backward in (False, True):
            assert [p.microbatch for p in passes if p.backward is backward] == list(range(microbatches))
        for i in range(microbatches):
            assert passes.index(Pass(i, False)) < passes.index(Pass(i, True))


@either
@everywhere
def test_a_stage_keeps_as_many_microbatches_as_said(schedule, stages, microbatches):
    for stage in range(stages):
        kept = most = 0
        for passed in order(schedule, stage, stages, microbatches):
            kept += -1 if passed.backward else 1
            most = max(most, kept)
        assert most == in_flight(schedule, stage, stages, microbatches)
    first = in_flight(schedule, 0, stages, microbatches)
    assert first == (microbatches if schedule == "gpipe" else min(microbatches, stages))


@either
@everywhere
def test_turns_are_all_passes_and_none_comes_before_what_it_needs(schedule, stages, microbatches):
    taken = turns(schedule, stages, microbatches)
    for stage in range(stages):
        passes = [turn.passed for turn in taken if turn.stage == stage]
        assert passes == order(schedule, stage, stages, microbatches)
    when = {turn: i for i, turn in enumerate(taken)}
    for stage in range(stages - 1):
        for i in range(microbatches):
            assert when[Turn(stage, Pass(i, False))] < when[Turn(stage + 1, Pass(i, False))]
            assert when[Turn(stage + 1, Pass(i, True))] < when[Turn(stage, Pass(i, True))]


@either
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2)])
@everywhere
def test_stages_of_equal_length_idle_for_one_pipeline_length_only(
    schedule, stages, microbatches, forward, backward
):
    ended: dict[Turn, int] = {}
    free = [0] * stages
    for turn in turns(schedule, stages, microbatches):
        stage, passed = turn
        below_or_above = Turn(stage + 1 if passed.backward else stage - 1, passed)
        free[stage] = max(free[stage], ended.get(below_or_above, 0)) + (
            backward if passed.backward else forward
        )
        ended[turn] = free[stage]
    assert max(free) == (microbatches + stages - 1) * (forward + backward)


@pytest.mark.parametrize("name", ["dni", "zero_bubble"])
def test_what_is_no_schedule_of_exact_backprop_is_refused(name):
    with pytest.raises(StageError, match=rf"Expected `schedule` to be one of .*'1f1b'.*, but got '{name}'"):
        check_schedule(name, 4)


@pytest.mark.parametrize("number", [0, -1, True, 2.0, "4"])
def test_what_is_no_number_of_microbatches_is_refused(number):
    with unchecked(), pytest.raises(StageError, match=r"`microbatches` to be an integer of at least 1"):
        check_schedule("1f1b", number)
