"""Run a function in several processes that a Trainer takes for torchrun's, and keep what comes of it."""

import logging
import os
import pickle
import socket
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def kept_in(whole: Path, parser: ArgumentParser, args: Namespace, free: str) -> Path | None:
    """The file of the whole run where no option but `free` was changed, else what `--csv` says."""
    changed = {name for name in vars(args) if getattr(args, name) != parser.get_default(name)}
    return args.csv if changed - {free} else whole


def run(function: Callable[[], T], processes: int, grouped: bool, seconds: float = 600.0) -> list[T]:
    """What each process returns.

    Args:
        function: What every process calls.
        processes: How many.
        grouped: Whether to make the process group; a Trainer makes it itself.
        seconds: After which it is given up.

    Raises:
        RuntimeError: A process has failed, or hangs.
    """
    context = get_context("fork")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ends = [context.Pipe(duplex=False) for _ in range(processes)]
    children = [
        context.Process(target=_child, args=(rank, processes, port, end[1], grouped, function), daemon=True)
        for rank, end in enumerate(ends)
    ]
    for child in children:
        child.start()
    said = [pickle.loads(end.recv_bytes()) if end.poll(seconds) else "hangs" for end, _ in ends]
    for child in children:
        child.join(2.0)
        child.kill()
    wrong = [f"rank {rank}: {what}" for rank, what in enumerate(said) if isinstance(what, str)]
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return said


def _child(
    rank: int, size: int, port: int, sender: Connection, grouped: bool, function: Callable[[], object]
) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if grouped:
            dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        said: object = function()
    except BaseException:
        said = traceback.format_exc()
    sender.send_bytes(pickle.dumps(said))
    sender.close()
    os._exit(0)
