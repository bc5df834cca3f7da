"""What the studies of the tests call and train: functions, a callback that sends signals, short YAMLs."""

import csv
import os
import signal
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure

from lightning_dni.cli import build
from lightning_dni.demos import DigitsDataModule
from lightning_dni.study.command import main

FIT = """
seeds: [0]
fit:
  model: {class_path: lightning_dni.demos.MLPClassifier, init_args: {hidden_size: 8, num_hidden: 1}}
  data: {class_path: lightning_dni.demos.DigitsDataModule}
  trainer:
    max_epochs: 1
    limit_train_batches: 3
    limit_test_batches: 1
    accelerator: cpu
    log_every_n_steps: 1
    enable_checkpointing: false
    limit_val_batches: 1
"""
CALL = """
recipe: {claim: Half is less than one}
seeds: [0, 1]
grid: {rate: [0.5, 1.0], kind: [a, b]}
call: study.parts.figures
arguments: {rate: "${run.rate}", seed: "${run.seed}"}
table: [final]
"""


class Counted(DigitsDataModule):
    """Counts how many of its kind there are."""

    alive: ClassVar = WeakSet()
    most: ClassVar = 0

    def __init__(self):
        super().__init__()
        Counted.alive.add(self)
        Counted.most = max(Counted.most, len(Counted.alive))


def study(text, *words, name="toy"):
    """Run the YAML `text` by the command; returns the exit code."""
    Path(f"{name}.yaml").write_text(text)
    return main(["--config", f"{name}.yaml", *words], build)


def rows(file="runs/toy/runs.csv"):
    with Path(file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def calls():
    """One line per call of `figures`, in order."""
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def figures(rate, seed=0, fails_at=None, draws=False, **named):
    with Path("calls.txt").open("a") as file:
        file.write(f"{rate} {seed}\n")
    if rate == fails_at:
        raise RuntimeError(f"rate {rate} is too much")
    curve = [rate**k + seed for k in range(1, 5)]
    drawn = {"drawn": Figure()} if draws else {}
    return {"final": torch.tensor(curve[-1]), "loss": curve, **drawn, **named}


def profile(kind, seed, lowest=2):
    """Metrics of layers, and two pictures."""
    sign = {"a": 1, "b": -1}[kind]
    pictures = {f"drawn_{k}": Figure(figsize=(2, 1), facecolor=(k / 10, 0, seed)) for k in (9, 10)}
    return {
        **{f"norm/net_{k}": sign * k + seed + 0.0 for k in (10, 9, lowest)},
        "error/net_9": 1.0,
        **pictures,
    }


def named():
    return {"final": 1.0}


def at_steps(steps):
    return {"step": steps, "loss": [2.0, 1.0]}


def profile_of(layer, seed):
    return {"final": layer + seed}


def killed_once(rate, seed):
    """As `figures`, but the second call of all ends the process at once."""
    result = figures(rate, seed)
    if len(calls()) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def interrupted_once(rate, seed):
    """As `figures`, but Ctrl-C comes in the third call of all."""
    result = figures(rate, seed)
    if len(calls()) == 3:
        raise KeyboardInterrupt
    return result


def ends_the_process(rate, seed):
    """As `figures`, but half of the runs end as scripts do."""
    if rate == 0.5:
        raise SystemExit("no such data")
    return figures(rate, seed)


def global_random():
    return {"drawn": torch.rand(()), "other": [torch.rand(()).item()]}


def nothing():
    return 3


class Interrupt(pl.Callback):
    """Sends a signal in the second training batch, once."""

    def __init__(self, signal_name="SIGINT"):
        self.number = getattr(signal, signal_name)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1 and not Path("interrupted").exists():
            Path("interrupted").touch()
            os.kill(os.getpid(), self.number)
