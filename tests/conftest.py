"""One seed, one thread, and a count of what a test leaves behind."""

import gc
import os
import threading

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)


def pytest_report_header(config):
    import lightning

    return f"torch {torch.__version__}, lightning {lightning.__version__}, 1 thread"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    """Whatever a test writes lands in its own folder."""
    monkeypatch.chdir(tmp_path)


def pytest_collection_finish():
    """Keep what is imported out of garbage collections: they would touch every page of it in every fork."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_threads_left():
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.daemon]
    assert not left, f"threads left running: {left}"


@pytest.fixture(autouse=True)
def _no_process_group_left():
    """A fork of this process would take it for its own, and wait for threads that it does not have."""
    yield
    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    assert not left, "a process group is left: run what makes it through processes.on_ranks"
