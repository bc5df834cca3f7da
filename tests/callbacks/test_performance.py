"""The clock, the counting of samples and the reading of memory."""

import sys
import time
from collections import namedtuple

import pytest
import torch

from lightning_dni.callbacks.performance import StepClock, peak_memory, reset_peak_memory, samples_in

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "name x")


def test_clock_counts_only_what_passes_while_it_runs():
    clock = StepClock()
    clock.run()
    time.sleep(0.05)
    clock.stop(CPU)
    time.sleep(0.2)
    clock.run()
    clock.run()  # it runs already
    time.sleep(0.05)
    clock.stop(CPU)
    clock.stop(CPU)  # it stands already
    clock.count(8, stepped=False)
    clock.count(8, stepped=True)
    clock.count(16, stepped=True)
    values = clock.read()
    assert 0.05 <= values["dni_step_time"] < 0.15
    assert values["dni_samples_per_second"] == pytest.approx(16 / values["dni_step_time"])


def test_clock_says_nothing_of_no_step_and_of_unknown_batches():
    clock = StepClock()
    clock.run()
    clock.stop(CPU)
    assert clock.read() == {}
    clock.count(0, stepped=True)
    assert clock.read().keys() == {"dni_step_time"}
    clock.reset()
    assert clock.read() == {}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(8, 3), 8),
        (torch.tensor(1.0), 1),
        ((torch.zeros(4, 3), torch.zeros(4)), 4),
        ({"id": "ab", "x": [torch.zeros(5)]}, 5),
        (Pair("ab", torch.zeros(6)), 6),
        ("text", 0),
        ([], 0),
        (None, 0),
    ],
    ids=repr,
)
def test_samples_are_the_rows_of_the_first_tensor(batch, expected):
    assert samples_in(batch) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_peak_memory_of_a_process_is_in_bytes_and_stays():
    held = torch.ones(2**24)  # 64 MiB
    peak = peak_memory(CPU)["dni_peak_memory"]
    assert held.nbytes < peak < 2**40
    del held
    reset_peak_memory(CPU)
    assert peak_memory(CPU)["dni_peak_memory"] >= peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_of_a_gpu_is_its_allocators():
    device = torch.device("cuda")
    reset_peak_memory(device)
    before = peak_memory(device)["dni_peak_memory"]
    torch.ones(2**24, device=device)
    assert peak_memory(device)["dni_peak_memory"] == before + 2**26
