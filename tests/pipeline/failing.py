"""Stages in real processes, of which one fails: who notices when, and what it says."""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from processes import free_port

from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.judge import Limits
from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.watch import open_watch

STAGES = 4
RANKS = [[stage] for stage in reversed(range(STAGES))]
FAILS_IN = 15
STEP = 0.04
QUICK = Limits(silence=1.5, patience=2.0, grace=1.0)
TOO_LATE = 20.0


def die(links):
    raise ValueError("nan in layer 7")


def kill(links):
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(links):
    os.kill(os.getpid(), signal.SIGSTOP)


def leave(links):
    os._exit(3)


def kill_in_wait(links):
    """Waits for a message that nobody sends, and is killed meanwhile."""
    threading.Timer(0.3, kill, (links,)).start()
    while True:
        links.activation_in.receive()


def kill_in_send(links):
    """Sends more than anybody takes, and is killed meanwhile."""
    threading.Timer(0.3, kill, (links,)).start()
    for step in count(FAILS_IN):
        links.activation_out.send(Message(step, Kind.TRAIN, (torch.zeros(2**20),)))


def hold_lock(links):
    """Keeps the interpreter's lock for much longer than the limit, so that no thread can run."""
    ctypes.PyDLL(None).usleep(int(2.5 * QUICK.silence * 1e6))


def end(links):
    raise StopIteration


class Outcome:
    """What the processes did: seconds from the fault to each one's end, exit codes, and last words."""

    def __init__(self, seconds, codes, said):
        self.seconds, self.codes, self.said = seconds, codes, said


def run(fault, victim, limits=QUICK, steps=None, body=None):
    """All stages until they have ended, or for `TOO_LATE` seconds after the fault.

    Args:
        fault: What the process `victim` does in step `FAILS_IN`.
        victim: Its stage.
        limits: Of the watch.
        steps: How many there are; None for no end.
        body: What each process does instead of training.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=_stage, args=(stage, port, fault, victim, limits, steps, body))
        for stage in range(STAGES)
    ]
    for process in processes:
        process.start()
    ended, since = {}, time.time() + 20
    try:
        while len(ended) < STAGES and time.time() < since + TOO_LATE:
            if Path("fault").exists():
                since = float(Path("fault").read_text() or since)
            ended |= {k: time.time() for k, p in enumerate(processes) if k not in ended and not p.is_alive()}
            time.sleep(0.01)
    finally:
        left = [stage for stage, p in enumerate(processes) if p.is_alive()]
        for process in processes:
            process.kill()
            process.join()
    assert not left, f"stages {left} still run"
    said = {k: Path(f"said-{k}").read_text() for k in range(STAGES) if Path(f"said-{k}").exists()}
    return Outcome(
        [ended[k] - since for k in range(STAGES)],
        [p.exitcode for p in processes],
        {k: json.loads(text) for k, text in said.items()},
    )


def _stage(stage, port, fault, victim, limits, steps, body):
    torch.set_num_threads(1)
    rank = RANKS[stage][0]
    sys.stderr = open(f"stderr-{stage}", "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    dist.init_process_group(
        "gloo", f"tcp://localhost:{port}", timedelta(seconds=60), rank=rank, world_size=STAGES
    )
    watch = open_watch(f"Stage {stage}", limits)
    links = Links()
    try:
        if body is fail_early and stage == victim:
            _fail_late(links, watch, fault)
        links = connect(RANKS, guard=watch)
        (body or _train)(links, watch, stage == victim and fault, steps)
        said = "done"
    except BaseException as error:
        watch.report(error)
        said = f"{type(error).__name__}: {error}"
    Path(f"said-{stage}").write_text(json.dumps(said))
    close(links, failed=said != "done", seconds=0.5 if said != "done" else 5.0)
    watch.close()
    os._exit(said != "done")


def _train(links, watch, fault, steps):
    for step in count() if steps is None else range(steps):
        watch.where = f"step {step}"
        if step == FAILS_IN and fault:
            Path("fault").write_text(str(time.time()))
            fault(links)
        if links.activation_in:
            assert links.activation_in.receive().step == step
        time.sleep(STEP)
        message = Message(step, Kind.TRAIN, (torch.zeros(16, 8),))
        if links.activation_out:
            links.activation_out.send(message)
        if links.gradient_out:
            links.gradient_out.send(message)
        if links.gradient_in and step >= 2:
            assert links.gradient_in.receive().step == step - 2


def stick(links, watch, fault, steps):
    """All but the victim wait where no error can reach them, as in somebody else's collective."""
    _fail_late(links, watch, fault)
    ctypes.CDLL(None).usleep(int(1e6 * TOO_LATE))


def stick_in_call(links, watch, fault, steps):
    """They wait for a collective that never ends, through the watch."""
    _fail_late(links, watch, fault)
    watch.wait(dist.barrier(async_op=True))


def fail_early(links, watch, fault, steps):
    """The victim fails before it is connected; who has no way to it gets further than that."""
    _train(links, watch, None, steps)


def _fail_late(links, watch, fault):
    if links.activation_in or links.activation_out:
        watch.where = f"step {FAILS_IN}"
    if fault:
        time.sleep(0.5)
        Path("fault").write_text(str(time.time()))
        fault(links)
