"""What a watch concludes, with several of them on one store in one process."""

import ctypes
import multiprocessing
import os
import re
import signal
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from processes import free_port

from lightning_dni.errors import StageError
from lightning_dni.pipeline.beacon import Address, Beacon
from lightning_dni.pipeline.board import prepare
from lightning_dni.pipeline.guard import Guard
from lightning_dni.pipeline.judge import FEW, Limits, peers_of
from lightning_dni.pipeline.process import this_process
from lightning_dni.pipeline.watch import Watch

LIMITS = Limits(silence=0.7, far_silence=1.5, patience=0.6)
LONG = 2.5


@contextmanager
def watches(processes, which=None, limits=LIMITS, beacons=None):
    """The watches of `which` of the processes; the others never give a sign of life."""
    store = dist.HashStore()
    prepare(store, len(processes))
    made = [Watch(store, k, processes, limits, beacons=beacons or {}) for k in which or range(len(processes))]
    try:
        yield made
    finally:
        for watch in reversed(made):
            watch.close(0.5)


def here(size=2):
    return [this_process(f"Stage {k}", k) for k in range(size)]


def raised_within(seconds, watch):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            watch.check()
        except StageError as error:
            return str(error)
        time.sleep(0.02)
    return None


def test_all_is_well():
    with watches(here(3)) as made:
        assert all(isinstance(watch, Guard) for watch in made)
        assert all(raised_within(LONG / 3, watch) is None for watch in made)


def test_the_first_error_counts_everywhere():
    with watches(here(3)) as (first, second, third):
        second.where = "step 7"
        second.report(KeyError("loss"))
        third.report(ValueError("later"))
        for watch in (first, second, third):
            said = raised_within(5, watch)
            assert said.startswith("Stage 1 (rank 1, host ")
            assert "failed in step 7: KeyError: 'loss'. Every stage stops" in said


def test_a_cause_that_comes_late_beats_a_symptom():
    with watches(here(), limits=LIMITS._replace(patience=10.0)) as (first, second):
        time.sleep(0.5)
        first.report(ValueError("nan"))
        assert "Stage 0 (rank 0" in str(second.blame(RuntimeError("Connection closed by peer")))


def test_a_lost_connection_that_nobody_explains_is_told():
    with watches(here()) as (first, second):
        second.where = "step 3"
        error = second.blame(StageError("Lost the connection while receiving gradients."))
        assert "Stage 1 (rank 1, host" in str(error)
        assert "noticed in step 3: Lost the connection while receiving gradients. Every" in str(error)
        assert raised_within(5, first) == str(error)


def test_a_lost_connection_is_no_cause():
    with watches(here(), limits=LIMITS._replace(patience=10.0)) as (first, second):
        first.report(ValueError("nan"))
        second.report(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]"))
        assert "ValueError: nan" in raised_within(1, second)


def test_silence_near_by_is_no_death():
    with watches(here(), [0]) as (watch,):
        assert raised_within(LONG, watch) is None


def test_silence_far_away_is_one():
    near, far = here()
    with watches([near, far._replace(machine="elsewhere", host="far")], [0]) as (watch,):
        said = raised_within(20, watch)
    assert said.startswith(
        "Stage 1 (rank 1, host far) is dead or cannot be reached: no heartbeat for 2 s, last heard"
    )


@contextmanager
def far_process(does=lambda: time.sleep(60)):
    """A process with a beacon and no heartbeat, and where it answers."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run():
        beacon = Beacon("localhost")
        sender.send(tuple(beacon.address))
        does()

    process = context.Process(target=run, daemon=True)
    process.start()
    try:
        yield process, Address(*receiver.recv())
    finally:
        process.kill()
        process.join()


@contextmanager
def far_away(address, limits=LIMITS):
    """The watch of rank 0, for which rank 1 is on another machine."""
    near, far = here()
    with watches([near, far._replace(machine="elsewhere", host="far")], [0], limits, {1: address}) as (
        watch,
    ):
        yield watch


def test_far_away_a_call_that_holds_the_interpreters_lock_is_slow_and_not_dead():
    with far_process(lambda: ctypes.PyDLL(None).sleep(60)) as (_, address), far_away(address) as watch:
        assert raised_within(2 * LONG, watch) is None


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (signal.SIGSTOP, r"no answer for \d+ s"),
        (signal.SIGKILL, r"its connection was lost \(.+\)"),
    ],
    ids=["frozen", "killed"],
)
def test_far_away_a_process_that_does_not_answer_is_dead(fault, found):
    limits = LIMITS._replace(far_silence=1e6)
    with far_process() as (process, address), far_away(address, limits) as watch:
        assert raised_within(1.5, watch) is None
        os.kill(process.pid, fault)
        said = raised_within(5, watch)
    start = r"Stage 1 \(rank 1, host far\) is dead or cannot be reached: "
    assert re.match(f"{start}{found}, last heard of in start-up", said), said


def test_far_away_a_store_that_does_not_answer_is_dead():
    """What everybody but rank 0 sees of a link that is cut; the interpreter does not matter there."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def keep():
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        prepare(store, 2)
        sender.send(store.port)
        ctypes.PyDLL(None).sleep(60)

    keeper = context.Process(target=keep, daemon=True)
    keeper.start()
    store = dist.TCPStore("localhost", receiver.recv(), wait_for_workers=False)
    far, near = here()
    limits = LIMITS._replace(far_silence=1e6)
    watch = Watch(store, 1, [far._replace(machine="elsewhere", host="far"), near], limits)
    try:
        assert raised_within(LONG, watch) is None
        os.kill(keeper.pid, signal.SIGSTOP)
        said = raised_within(5, watch)
    finally:
        keeper.kill()
        keeper.join()
        watch.close(0.5)
    assert re.match(r"Stage 0 \(rank 0, host far\) is dead or cannot be reached: no answer for 1 s", said), (
        said
    )


def test_a_beacon_that_was_never_seen_tells_nothing():
    with far_away(Address("localhost", free_port()), LIMITS._replace(far_silence=1e6)) as watch:
        assert raised_within(LONG, watch) is None


def test_a_process_with_the_same_number_is_another_one():
    near, gone = here()
    with watches([near, gone._replace(started="1")], [0]) as (watch,):
        assert f"is gone: its process {os.getpid()} does not run any more" in raised_within(20, watch)


def test_who_leaves_normally_is_not_missed():
    near, far = here()
    with watches([near, far._replace(machine="elsewhere")]) as (first, second):
        second.close()
        assert raised_within(LONG, first) is None


def test_a_call_gives_what_the_function_gives():
    with watches(here()) as (first, _):
        assert first.call(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            first.call(lambda: 1 / 0)


def test_a_call_is_left_when_a_stage_fails():
    with watches(here()) as (first, second):
        second.report(ValueError("nan"))
        start = time.monotonic()
        with pytest.raises(StageError, match=r"Stage 1 .* failed in start-up: ValueError: nan\."):
            first.call(lambda: time.sleep(5))
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("size", [1, 2, FEW, FEW + 1, 100])
def test_everybody_is_watched(size):
    peers = {rank: peers_of(rank, size) for rank in range(size)}
    assert all(rank not in peers[rank] for rank in peers)
    for rank in range(size):
        assert sum(rank in watched for watched in peers.values()) >= min(size - 1, 4)
        assert rank == 0 or 0 in peers[rank]
