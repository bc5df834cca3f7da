"""Fits whose stages are real processes, of which one fails: who ends when, how, and with which words."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from fits import BOUNDARIES, LINEAR, BrokenError, Net, loader, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import free_port

from lightning_dni import DNIPipelineStrategy

STAGES = 3
FAILS_IN = 5
SAVES_EVERY = 2
SECONDS = 10.0
"""What an issue allows from the fault to the end of the last process."""

GIVEN_UP = 90.0


def die():
    raise BrokenError("nan in layer 7")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


INHERITED = set()
"""What this process shares with the one that has forked it, which must not lose its own connections."""


def files():
    """What is open, by number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def unplug():
    """Every connection of this process ends, and it does not."""
    for number in [number for number, what in files().items() if what not in INHERITED]:
        with suppress(OSError), socket.socket(fileno=os.dup(number)) as end:
            end.getpeername()  # one that only listens has none
            end.shutdown(socket.SHUT_RDWR)


ACTIONS = {"die": die, "kill": kill}


class Faulty(Net):
    """A module in which rank `victim` calls `action` in the hook `where`."""

    action = victim = where = None  # no arguments: those are saved with every checkpoint

    def at(self, where):
        if where == self.where and self.trainer.global_rank == self.victim:
            happen(self.action)

    def setup(self, stage):
        self.at("setup")

    def configure_optimizers(self):
        self.at("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self):
        self.at("on_fit_start")

    def training_step(self, batch, batch_idx):
        self.at(f"training_step {batch_idx}")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.at(f"validation_step {batch_idx}")
        return super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        if self.trainer.global_step > SAVES_EVERY:
            self.at("on_save_checkpoint")


def faulty(action=None, victim=None, where=None, kind=Faulty):
    module = kind()
    module.action, module.victim, module.where = action, victim, where
    return module


def happen(action):
    """Do it, after a note of when."""
    if not Path("fault").exists():
        Path("fault").write_text(json.dumps(time.time()))
    action()


class Outcome:
    """What the processes did, by rank: seconds from the fault to the end, exit codes, and what they wrote."""

    def __init__(self, seconds, codes, said):
        self.seconds, self.codes, self.said = seconds, codes, said


def run(fit, world_size=STAGES):
    """All ranks of `fit(rank)` until they have ended."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, fit)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    ended, until = {}, time.time() + GIVEN_UP
    try:
        while len(ended) < world_size and time.time() < until:
            ended |= {r: time.time() for r, p in enumerate(processes) if r not in ended and not p.is_alive()}
            time.sleep(0.01)
        left = living([process.pid for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = [Path(f"stderr-{rank}").read_text() for rank in range(world_size)]
    assert not left, (left, said)
    since = json.loads(Path("fault").read_text()) if Path("fault").exists() else time.time()
    return Outcome(
        [ended[rank] - since for rank in range(world_size)], [process.exitcode for process in processes], said
    )


def living(sessions):
    """Processes of these sessions that still run: number, state and command line."""
    return [found for found in processes() if found[2] in sessions]


def children():
    """Processes that this one has started and that still run."""
    return [found for found in processes() if found[1] == os.getpid()]


def processes():
    """Number, parent, session and command line of every process that runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if state not in "ZX":
                line = (folder / "cmdline").read_text().replace("\0", " ")
                found.append((int(folder.name), int(parent), int(session), line))
    return found


def _rank(rank, world_size, port, fit):
    INHERITED.update(files().values())
    os.setsid()
    sys.stderr = open(f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
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
    warnings.simplefilter("ignore")
    fit(rank)


def trainer_of(strategy=None, stages=STAGES, callbacks=(), **options):
    keep = ModelCheckpoint("kept", "{step}", save_top_k=-1, every_n_train_steps=SAVES_EVERY)
    given = {"val_check_interval": 4, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return quiet_trainer(
        strategy or staged(),
        devices=stages,
        enable_checkpointing=True,
        callbacks=[*callbacks, keep],
        **{**given, **options},
    )


def staged(**options):
    return DNIPipelineStrategy(**{"boundaries": BOUNDARIES, "estimator": LINEAR, **options})


def faulty_fit(action, victim, where, strategy=None, callbacks=(), ckpt_path=None, **options):
    """What a rank does whose module is `Faulty`."""

    def fit(rank):
        torch.manual_seed(0)
        trainer = trainer_of(staged(**(strategy or {})), callbacks=callbacks, **options)
        trainer.fit(faulty(action, victim, where), loader(), loader(16), ckpt_path=ckpt_path)

    return fit
