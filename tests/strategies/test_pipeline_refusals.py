"""What stages cannot do is refused on every rank before any step, with the reason and what to do instead."""

import re
import warnings
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import BOUNDARIES, CLASSES, LINEAR, Net, loader, net, newer, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from strategies.staged_fits import fit_staged, on_stages, staged, staged_trainer
from torch import nn
from versions import newer_lightning

from lightning_dni import DNIPipelineStrategy
from lightning_dni.core import Lock
from lightning_dni.estimators import FeedbackAlignmentEstimator
from lightning_dni.strategies._compat import MisconfigurationException
from lightning_dni.strategies.refusals import refuse_nodes_apart, warn_of_waits


def said_by(body, ranks=2):
    """What each rank's error says."""

    def caught(rank):
        try:
            body(rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return on_stages(caught, stages=ranks, seconds=60)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class SecondOrder(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class TwoOptimizers(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in self.net]


class Tied(Net):
    def __init__(self):
        super().__init__(width=6)
        self.net[1][0].weight = self.net[0][0].weight


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.aside = nn.Linear(2, 2)


class Reading(Net):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Locked(LINEAR.func):
    """Says nothing before it is told."""

    locks = frozenset({Lock.UPDATE})


def averaging(kind):
    if kind is StochasticWeightAveraging:
        return kind(swa_lrs=0.1)
    return kind()


HALF = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

REFUSED = {
    "16-mixed": ({"plugins": HALF}, Net, {}, "without a gradient scaler .* precision='bf16-mixed'"),
    "manual": ({}, Manual, {}, "Expected automatic optimization"),
    "an iterator": ({}, Reading, {}, "but training_step of Reading takes `dataloader_iter`"),
    "second order": ({}, SecondOrder, {}, "got LBFGS, which evaluates it several times"),
    "several optimizers": ({}, TwoOptimizers, {}, "multiple optimizers is only supported with manual"),
    "sync_batchnorm": ({"sync_batchnorm": True}, Net, {}, "Expected sync_batchnorm=False"),
    "a time": (
        {"val_check_interval": timedelta(minutes=1)},
        Net,
        {},
        "Expected `val_check_interval` in batches",
    ),
    "unknown": ({}, Net, {"boundaries": ["net.7"]}, "Expected `boundaries` to name submodules.*net.7"),
    "tied": ({}, Tied, {}, "StageError: .*net.1.0.weight|StageError: .*net.0.0.weight"),
    "not run": ({}, Unused, {"boundaries": ["aside"]}, "BoundaryError: Expected every boundary to run"),
    "bp_lambda": (
        {},
        Net,
        {"bp_lambda": {"net.0": 0.5}},
        "bp_lambda=0.5 at boundary 'net.0'. Pass staleness=0",
    ),
    "update": ({}, Net, {"update": "immediate"}, "Expected no `update` under strategy='dni_pipeline'"),
    "locked": (
        {},
        Net,
        {"estimator": partial(Locked, num_classes=CLASSES)},
        "Locked, which is told first, at boundary 'net.0'. Pass staleness=0",
    ),
    "prop_alpha": (
        {},
        Net,
        {"estimator": partial(LINEAR, prop_alpha=0.5)},
        "LinearEstimator, which is told first, at boundary 'net.0'. Pass staleness=0",
    ),
    "feedback alignment": (
        {},
        Net,
        {"estimator": FeedbackAlignmentEstimator, "staleness": 1},
        "FeedbackAlignmentEstimator, which is told first, at boundary 'net.0'. Pass staleness=0",
    ),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[newer_lightning] if what == "a time" else []) for what in REFUSED]
)
def test_what_stages_cannot_do_is_refused_on_every_rank(what):
    trainer, kind, strategy, message = REFUSED[what]

    def body(rank):
        torch.manual_seed(0)
        fit_staged(module=kind(), strategy=staged(**strategy), **trainer)

    for said in said_by(body):
        assert re.search(message, said, re.DOTALL), said


@pytest.mark.parametrize("kind", [StochasticWeightAveraging, newer("WeightAveraging")])
def test_averaging_of_weights_is_refused(kind):
    for said in said_by(lambda rank: fit_staged(callbacks=[averaging(kind)])):
        assert (
            f"Expected no weight averaging under strategy='dni_pipeline', but got ['{kind.__name__}']" in said
        )


@pytest.mark.parametrize(("processes", "boundaries"), [(1, 1), (2, 2), (3, 1)])
def test_another_number_of_processes_than_of_stages_is_refused(processes, boundaries):
    def body(rank):
        strategy = staged(boundaries=BOUNDARIES[:boundaries])
        fit_staged(strategy=strategy, devices=processes)

    expected = (
        f"Expected {boundaries + 1} processes or a multiple of it, one per stage of boundaries "
        f"{BOUNDARIES[:boundaries]}, but got {processes}."
    )
    for said in said_by(body, ranks=processes):
        assert expected in said


def test_several_nodes_that_nobody_connects_are_refused(monkeypatch):
    for name in ("MASTER_ADDR", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    trainer = quiet_trainer(DNIPipelineStrategy(BOUNDARIES, LINEAR), devices=1, num_nodes=3)
    with pytest.raises(MisconfigurationException, match=r"Expected a cluster for num_nodes=3.*torchrun"):
        trainer.fit(net(), loader())


def test_several_nodes_that_know_each_other_are_not_refused(monkeypatch):
    refuse_nodes_apart(3, TorchElasticEnvironment())
    refuse_nodes_apart(1, LightningEnvironment())
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("NODE_RANK", "1")
    refuse_nodes_apart(3, LightningEnvironment())


# ---- warnings


class Reads(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss = outputs["loss"]


class Ignores(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss = batch_idx


class ReadsItself(Net):
    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.seen = outputs


def warned(module, *callbacks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_waits(staged_trainer(devices=1, enable_checkpointing=True, callbacks=list(callbacks)), module)
    return [str(warning.message) for warning in caught]


def test_a_checkpoint_by_time_warns_that_all_stages_wait():
    by_time = ModelCheckpoint("here", train_time_interval=timedelta(minutes=1))
    (said,) = warned(net(), by_time)
    assert re.search("train_time_interval` asks all processes in every batch.*every_n_train_steps", said)
    assert warned(net(), ModelCheckpoint("here", every_n_train_steps=3)) == []


def test_who_reads_outputs_is_warned_that_only_the_last_stage_has_them():
    (said,) = warned(ReadsItself(), Reads(), Ignores())
    assert "['Reads.on_train_batch_end', 'ReadsItself.on_validation_batch_end'] use `outputs`" in said
    assert "trainer.is_global_zero" in said
    assert warned(net(), Ignores(), ModelCheckpoint("here")) == []
