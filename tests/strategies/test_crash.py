"""A process killed while it writes a checkpoint: the one before survives, and the run goes on from it."""

import multiprocessing
import os
import signal

import pytest
import torch
from fits import dni, fit, loader, net, quiet_trainer
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from strategies.resuming import assert_same_state, state_of


def killed_in_mid_write(first, keep):
    """A fit whose process dies with half of a file written, once the checkpoint `first` is there."""
    opened = LocalFileOpener.write

    def write(self, data):
        if len(data) > 1000 and first.exists():
            opened(self, data[: len(data) // 2])
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, data)

    LocalFileOpener.write = write
    fit(net(dropout=0.3), dni(rng="stage"), callbacks=[keep], enable_checkpointing=True, max_epochs=3)


@pytest.mark.parametrize(
    ("top_k", "last"), [(1, False), (-1, True)], ids=["the best only", "all, and the last"]
)
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, top_k, last):
    folder, first = tmp_path / "checkpoints", "epoch=0.ckpt"
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_last=last, save_top_k=top_k)
    process = multiprocessing.get_context("fork").Process(
        target=killed_in_mid_write, args=(folder / first, keep), daemon=True
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
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
