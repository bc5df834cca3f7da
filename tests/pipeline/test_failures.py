"""One stage fails: every other one stops soon, names it, and no process is left."""

import re
from pathlib import Path

import pytest
from pipeline import failing
from pipeline.failing import STAGES, run

from lightning_dni.pipeline.judge import Limits


def assert_all_stopped(outcome, victim, says, seconds):
    """Everybody but the victim has raised the error that names the victim and what it did."""
    for stage in set(range(STAGES)) - {victim}:
        assert re.match(f"StageError: {says}", outcome.said[stage]), outcome.said[stage]
        assert outcome.codes[stage] == 1
    assert max(outcome.seconds) < seconds, outcome.seconds


@pytest.mark.parametrize("victim", [2, STAGES - 1, 0])
def test_an_exception_is_told_everywhere(victim):
    outcome = run(failing.die, victim)
    who = rf"Stage {victim} \(rank {STAGES - 1 - victim}, host \S+\)"
    assert_all_stopped(outcome, victim, rf"{who} failed in step 15: ValueError: nan in layer 7\.", 5)
    assert outcome.said[victim] == "ValueError: nan in layer 7"
    assert "in die" in outcome.said[1]  # its traceback


@pytest.mark.parametrize("victim", [1, STAGES - 1])
@pytest.mark.parametrize("fault", [failing.kill, failing.leave])
def test_a_dead_process_is_named(fault, victim):
    outcome = run(fault, victim)
    says = rf"Stage {victim} \(rank {STAGES - 1 - victim}, .*\) is gone: .* not run any more, .* in step"
    assert_all_stopped(outcome, victim, says, 5)
    assert outcome.codes[victim] in (-9, 3)


@pytest.mark.parametrize("victim", [1, STAGES - 1])
def test_a_frozen_process_is_named_and_ended(victim):
    outcome = run(failing.freeze, victim, Limits())
    assert_all_stopped(
        outcome, victim, rf"Stage {victim} .* is frozen: .* is stopped and .* in step .*; it", 10
    )
    assert outcome.codes[victim] == -9


@pytest.mark.parametrize("fault", [failing.kill_in_wait, failing.kill_in_send])
def test_a_process_is_killed_while_it_waits(fault):
    assert_all_stopped(run(fault, 2), 2, "Stage 2 .* is gone: .* last heard of in step", 5)


def test_a_slow_process_is_not_dead():
    outcome = run(failing.hold_lock, 1, steps=25)
    assert outcome.said == dict.fromkeys(range(STAGES), "done")
    assert outcome.codes == [0] * STAGES
    assert min(outcome.seconds) > 2.5 * failing.QUICK.silence


def test_nobody_stays_in_a_collective():
    outcome = run(failing.die, 2, body=failing.stick)
    assert outcome.codes == [1] * STAGES
    assert max(outcome.seconds) < 5
    for stage in {0, 1, 3}:
        assert stage not in outcome.said  # the training thread never came back
        assert re.search(
            r"Stage 2 .* failed in step 15: ValueError.*stuck in step 15, so this process ends here\.",
            Path(f"stderr-{stage}").read_text(),
            re.S,
        )


def test_a_collective_through_the_watch_can_be_left():
    outcome = run(failing.die, 2, body=failing.stick_in_call)
    assert_all_stopped(outcome, 2, "Stage 2 .* failed in step 15: ValueError: nan in layer 7", 5)


@pytest.mark.parametrize(("fault", "says"), [(failing.die, "failed"), (failing.kill, "is gone")])
def test_a_stage_fails_before_it_is_connected(fault, says):
    outcome = run(fault, 2, body=failing.fail_early)
    assert_all_stopped(outcome, 2, f"Stage 2 .* {says}.* in start-up", 5)
