"""Run a function in several real processes that can reach each other, and collect what it returns."""

import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from datetime import timedelta
from tempfile import TemporaryFile

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=30)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class ReplicaError(Exception):
    """What went wrong in the processes, by rank."""


def on_ranks(function, *args, world_size=2, seconds=60, grouped=True):
    """`[function(rank, *args) for each rank]`, each in a forked process with gloo between them.

    With `grouped=False` no process group is made: the environment is that of torchrun, for a Trainer to
    find. Raises ReplicaError with all tracebacks if a process fails, or if one is not done in time.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    dumps = [TemporaryFile() for _ in range(world_size)]  # noqa: SIM115  (where a process hangs)
    ends = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(
            target=_replica,
            args=(rank, world_size, port, ends[rank][1], dumps[rank], grouped, seconds, function, args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    said = {}
    try:
        for rank, (receiver, _) in enumerate(ends):
            if receiver.poll(max(0.0, until - time.monotonic())):
                said[rank] = pickle.loads(receiver.recv_bytes())
    finally:
        for process in processes:
            process.join(1.0)
            process.kill()
            process.join()
    for rank, dump in enumerate(dumps):
        dump.seek(0)
        said.setdefault(rank, (False, "hangs\n" + dump.read().decode()))
        dump.close()
    wrong = {rank: what for rank, (well, what) in said.items() if not well}
    if wrong:
        raise ReplicaError("\n".join(f"rank {rank}: {what}" for rank, what in wrong.items()))
    return [said[rank][1] for rank in range(world_size)]


def _replica(rank, world_size, port, sender, dump, grouped, seconds, function, args):
    faulthandler.dump_traceback_later(max(1.0, seconds - 2.0), file=dump)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    torch.set_num_threads(1)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        if grouped:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        said = True, function(rank, *args)
    except BaseException:
        said = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(said))  # tensors by value, not by a file that dies with us
    sender.close()
    os._exit(0)  # as a crash: no peer is waited for
