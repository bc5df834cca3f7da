"""What the operating system says about a process."""

import os
import signal
import subprocess
import time

from lightning_dni.pipeline.process import Condition, Process, _state_of, this_process


def eventually(process, condition):
    until = time.monotonic() + 5
    while process.condition() is not condition and time.monotonic() < until:
        time.sleep(0.01)
    return process.condition() is condition


def test_a_process_runs_stops_goes_on_and_dies():
    child = subprocess.Popen(["sleep", "60"])
    try:
        mine = this_process("Stage 0", 0)
        process = mine._replace(pid=child.pid, started=_state_of(child.pid)[1])
        assert process.condition() is Condition.RUNNING
        os.kill(child.pid, signal.SIGSTOP)
        assert eventually(process, Condition.STOPPED)
        os.kill(child.pid, signal.SIGCONT)
        assert eventually(process, Condition.RUNNING)
        process.kill()
        assert eventually(process, Condition.GONE)  # nobody has waited for it yet
    finally:
        child.kill()
        child.wait()
    assert process.condition() is Condition.GONE
    process.kill()  # of nobody


def test_a_process_elsewhere_cannot_be_seen():
    mine = this_process("Stage 3", 5)
    assert mine.condition() is Condition.RUNNING
    assert mine._replace(machine="elsewhere").condition() is Condition.UNKNOWN
    assert mine._replace(started="").condition() is Condition.UNKNOWN
    assert str(Process("Stage 3", 5, "far", "", 1, "")) == "Stage 3 (rank 5, host far)"
