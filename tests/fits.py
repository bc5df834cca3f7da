"""A small module, its data and a quiet Trainer, for tests that need a real fit."""

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni import DNIStrategy
from lightning_dni.estimators import LinearEstimator

CLASSES, FEATURES = 3, 6
BOUNDARIES = ["net.0", "net.1"]
LINEAR = partial(LinearEstimator, num_classes=CLASSES)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-2),
}


class Net(pl.LightningModule):
    """Hidden stages, `net.0` and `net.1` (linear, [batch norm,] ReLU[, dropout]), and `net.2` on top.

    No bias before batch norm: its gradient is zero but for rounding, which Adam blows up to 1e-11 a step.
    """

    def __init__(self, dropout=0.0, batch_norm=False, optimizer="sgd", width=8, hidden=2):
        super().__init__()
        self.save_hyperparameters()
        stages = []
        for features in (FEATURES, *[width] * (hidden - 1)):
            norm = [nn.BatchNorm1d(width)] if batch_norm else []
            drop = [nn.Dropout(dropout)] if dropout else []
            stages.append(
                nn.Sequential(nn.Linear(features, width, bias=not batch_norm), *norm, nn.ReLU(), *drop)
            )
        self.net = nn.Sequential(*stages, nn.Linear(width, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return OPTIMIZERS[self.hparams.optimizer](self.parameters())


class Losses(pl.Callback):
    """The logged loss of every batch, and the logged validation losses."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.train.append(trainer.callback_metrics["loss"].item())

    def on_validation_epoch_end(self, trainer, module):
        self.val.append(trainer.callback_metrics["val_loss"].item())


class AtBatchStart(pl.Callback):
    """Calls `action(trainer, module, batch_idx)` before every training batch."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.action(trainer, module, batch_idx)


class AtBatchEnd(pl.Callback):
    """Calls `action(trainer, module, batch_idx)` after every training batch."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.action(trainer, module, batch_idx)


def newer(name):
    """A callback that older supported versions of Lightning lack, as a parameter that is skipped there."""
    found = getattr(pl.callbacks, name, None)
    return pytest.param(found, id=name, marks=pytest.mark.skipif(found is None, reason=f"no {name} there"))


class BrokenError(Exception):
    """What a test raises inside a fit."""


def dataset(rows=80):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, FEATURES, generator=generator), torch.arange(rows) % CLASSES)


def loader(rows=80, batch_size=8, **options):
    return DataLoader(dataset(rows), batch_size, **options)


def dni(**options):
    """A strategy with linear estimators at both boundaries."""
    return DNIStrategy(**{"boundaries": BOUNDARIES, "estimator": LINEAR, **options})


def quiet_trainer(strategy="auto", **options):
    quiet = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu"}
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(**{**quiet, **silent, "strategy": strategy, **options})


def fit(module, strategy="auto", train=None, val=None, ckpt_path=None, seed=0, **options):
    """A fit of `module`; returns its Trainer."""
    trainer = quiet_trainer(strategy, **options)
    torch.manual_seed(seed)
    trainer.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def weights(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


def different(one, other):
    """Names under which two state dicts do not hold the same bits."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def hooks_on(module):
    """How many hooks of any kind are on `module`, its children and its parameters."""
    kinds = [k for k in vars(nn.Module()) if k.endswith(("_hooks", "_hooks_with_kwargs"))]
    on_modules = sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)
    return on_modules + sum(len(p._backward_hooks or ()) for p in module.parameters())


def attributes(module):
    """What every submodule and parameter has in its `__dict__`, by name."""
    names = {name: set(vars(m)) for name, m in module.named_modules()}
    return names | {name: set(vars(p)) for name, p in module.named_parameters()}
