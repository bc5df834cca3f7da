"""A process killed while it writes a checkpoint: the one before survives, and the run goes on from it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import dni, fit, loader, net, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from strategies.resuming import assert_same_state, state_of

TESTS = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from fits import dni, fit, net

torch.set_num_threads(1)
opened = LocalFileOpener.write


def write(self, data):
    if len(data) > 1000 and os.path.exists({first!r}):
        opened(self, data[: len(data) // 2])
        self.f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return opened(self, data)


LocalFileOpener.write = write
keep = ModelCheckpoint(dirpath={folder!r}, filename="{{epoch}}", save_last={last}, save_top_k={top_k})
fit(net(dropout=0.3), dni(rng="stage"), callbacks=[keep], enable_checkpointing=True, max_epochs=3)
"""


@pytest.mark.parametrize(
    ("top_k", "last"), [(1, False), (-1, True)], ids=["the best only", "all, and the last"]
)
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, top_k, last):
    folder, first = tmp_path / "checkpoints", "epoch=0.ckpt"
    script = SCRIPT.format(
        tests=str(TESTS), folder=str(folder), first=str(folder / first), top_k=top_k, last=last
    )
    package = {
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    made = subprocess.run(
        [sys.executable, "-c", script], env=package, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert made.returncode == -signal.SIGKILL, made.stderr[-2000:]
    whole = {p.name for p in folder.glob("*.ckpt")}
    assert first in whole
    for name in whole:  # whatever bears a checkpoint's name can be read
        torch.load(folder / name, weights_only=True)

    options = {"max_epochs": 3}
    resumed = fit(net(seed=5, dropout=0.3), dni(rng="stage"), ckpt_path=folder / first, **options)
    straight = fit(net(dropout=0.3), dni(rng="stage"), **options)
    assert_same_state(state_of(resumed), state_of(straight))


class Full(TorchCheckpointIO):
    """A disk that is full from the second checkpoint on."""

    def __init__(self):
        self.written = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.written += 1
        if self.written > 1:
            raise OSError("No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_full_disk_leaves_checkpoint_module_and_trainer_usable(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    module, full = net(), Full()
    trainer = quiet_trainer(dni(), plugins=[full], callbacks=[keep], enable_checkpointing=True, max_epochs=3)
    torch.manual_seed(0)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(module, loader())
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["epoch=0.ckpt"]
    full.written = -100
    trainer.fit(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_state(state_of(trainer), state_of(fit(net(), dni(), max_epochs=3)))
