"""Synthetic inputs under a Trainer: in training only, in checkpoints, in the log; and what is refused."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from callbacks.runs import csv_rows, rows_with
from core.nets import mlp
from core.test_delays import Alone
from fits import BOUNDARIES, LINEAR, Losses, Net, different, dni, fit, loader, net, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from lightning_dni import GradientMonitor, MLPInputEstimator
from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.pipeline.engine import StageEngine

INPUTS = {"synthetic_inputs": partial(MLPInputEstimator, hidden_sizes=(8,))}
normed = partial(net, dropout=0.3, batch_norm=True)


class RealLoss(pl.Callback):
    """What the plain model makes of the validation rows, by hand."""

    def __init__(self):
        self.losses = []

    def on_validation_epoch_end(self, trainer, module):
        with torch.no_grad():
            found = [F.cross_entropy(module.net(x), y) for x, y in loader(16)]
        self.losses.append((sum(found) / len(found)).item())


def test_validation_test_and_prediction_are_those_of_the_plain_model():
    seen, real, module = Losses(), RealLoss(), normed()
    trainer = fit(module, dni(**INPUTS), val=loader(16), callbacks=[seen, real], max_epochs=3)
    assert len(seen.val) == 4  # one of them before training
    assert seen.val == real.losses
    plain = fit(normed(), "auto", max_steps=0)
    plain.lightning_module.load_state_dict(module.state_dict())
    for run in ("validate", "test"):
        ours, theirs = (
            getattr(t, run)(t.lightning_module, loader(16), verbose=False) for t in (trainer, plain)
        )
        assert ours == theirs
    ours, theirs = (t.predict(t.lightning_module, loader(16)) for t in (trainer, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_trains_and_inputs_change_the_run():
    ends = []
    for options in ({}, INPUTS):
        module = normed()
        before = weights(module)
        fit(module, dni(**options))
        moved = different(before, weights(module))
        assert {n for n, _ in module.named_parameters()} <= set(moved)
        ends.append(weights(module))
    assert different(*ends)


def test_the_monitor_logs_the_input_error_and_asks_for_no_true_gradient():
    logger, module = CSVLogger("."), normed()
    fit(
        module,
        dni(**INPUTS),
        callbacks=[GradientMonitor(every_n_train_steps=2)],
        logger=logger,
        log_every_n_steps=2,
        max_epochs=4,
    )
    rows = csv_rows(logger)
    for name in ("net_0", "net_1"):
        errors = [
            rows[step][f"dni_input_error/{name}"] for step in rows_with(rows, f"dni_input_error/{name}")
        ]
        assert len(errors) == 20
        assert errors[-1] < errors[0]
    assert not any("true_gradient" in key for row in rows.values() for key in row)
    unwatched = normed()
    fit(unwatched, dni(**INPUTS), max_epochs=4)
    assert different(weights(module), weights(unwatched)) == []


def test_a_probe_that_is_asked_for_is_refused():
    with pytest.raises(StageError, match="Expected no probe of true gradients with synthetic inputs"):
        fit(normed(), dni(**INPUTS), callbacks=[GradientMonitor(2, probe=True)])


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({}, INPUTS, "the input estimators start afresh: there were none"),
        (INPUTS, {}, "the input estimators are dropped: there are none any more"),
    ],
    ids=["without", "with"],
)
def test_another_run_says_what_becomes_of_them(tmp_path, first, then, said):
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(normed(), dni(**first), callbacks=[keep], enable_checkpointing=True)
    with pytest.warns(UserWarning, match=said):
        fit(normed(), dni(**then), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


def test_weights_alone_have_no_optimizer_of_theirs(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="light", save_weights_only=True)
    fit(normed(), dni(**INPUTS), callbacks=[keep], enable_checkpointing=True)
    state = torch.load(tmp_path / "light.ckpt", weights_only=True)["lightning_dni"]
    assert set(state["inputs"]["estimators"]) == set(BOUNDARIES)
    assert "optimizers" not in state["inputs"]


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))


def test_manual_optimization_replicas_and_pipelines_are_refused():
    with pytest.raises(StageError, match="one loss per training step with synthetic inputs"):
        fit(Manual(), dni(**INPUTS))
    with pytest.raises(StageError, match="Expected no replicas with synthetic inputs"):
        DNIEngine(mlp(), ["0"], LINEAR, exchange=Alone(), **INPUTS)
    with pytest.raises(EstimatorError, match="Expected no `synthetic_inputs` in a pipeline"):
        StageEngine(mlp(), ["0"], LINEAR, **INPUTS)
