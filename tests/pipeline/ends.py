"""A script of two stages, for the end of a process: `python ends.py PORT` prints two exit codes.

Connects, trains and closes twice; the third time nobody closes, as rank 1 raises an error.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.message import Kind, Message
from lightning_dni.pipeline.watch import open_watch


def train(rank, port):
    dist.init_process_group("gloo", f"tcp://localhost:{port}", timedelta(seconds=60), rank=rank, world_size=2)
    files = []
    for fit in range(3):
        watch = open_watch(f"Stage {1 - rank}")
        links = connect([[1], [0]], guard=watch, with_output=True)
        for step in range(20):
            watch.where = f"step {step}"
            message = Message(step, Kind.TRAIN, (torch.zeros(1000),))
            if fit == 2 and step == 10 and rank == 1:
                raise ValueError("nan in layer 7")
            if rank == 1:
                links.activation_out.send(message)
                links.gradient_in.receive()
            else:
                links.activation_in.receive()
                links.gradient_out.send(message)
        for _ in range(2):
            close(links)
            watch.close()
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("dni")]
        assert not left, left
        files.append(len(os.listdir("/proc/self/fd")))
        assert files[-1] == files[0], files


def main(port):
    children = []
    for rank in range(2):  # forked, so that torch is imported once; they end as every interpreter does
        child = os.fork()
        if not child:
            os.dup2(os.open(f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
            train(rank, port)
            return
        children.append(child)
    codes = (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    sys.stdout.write(" ".join(map(str, codes)))


if __name__ == "__main__":
    main(sys.argv[1])
