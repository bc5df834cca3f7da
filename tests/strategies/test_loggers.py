"""Loggers see what they see without us, and no logger changes a number."""

import csv
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import wandb
from callbacks.runs import read_run
from fits import Net, different, dni, fit, loader, net, quiet_trainer, weights
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from strategies.loops import MLP


class Scheduled(Net):
    def configure_optimizers(self):
        groups = [{"params": self.net[i].parameters(), "name": f"stage {i}"} for i in range(3)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def made():
    torch.manual_seed(0)
    return Scheduled(dropout=0.3)


def rows_of(folder):
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_lambda_one_logs_the_rows_of_the_plain_trainer(tmp_path):
    rows = []
    for name, strategy in {"plain": "auto", "ours": dni(bp_lambda=1.0, estimator=MLP)}.items():
        logger = CSVLogger(tmp_path, name=name)
        rates = LearningRateMonitor(logging_interval="step", log_momentum=True)
        fit(made(), strategy, loader(shuffle=True), loader(24), logger=logger, callbacks=[rates],
            log_every_n_steps=2, max_epochs=3)  # fmt: skip
        rows.append(rows_of(logger.log_dir))
    assert rows[0] == rows[1]
    assert {"lr-SGD/stage 0", "lr-SGD/stage 2-momentum", "loss", "val_loss"} <= set(rows[0][0])


@pytest.mark.parametrize("logger", [False, True, CSVLogger])
def test_a_logger_changes_no_number(tmp_path, logger):
    ends = []
    for chosen in (False, CSVLogger(tmp_path) if logger is CSVLogger else logger):
        module = made()
        fit(module, dni(), val=loader(24), logger=chosen, log_every_n_steps=1, max_epochs=2)
        ends.append(weights(module))
    assert different(*ends) == []


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_gets_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(made(), dni(), logger=logger, log_every_n_steps=1)
    read = EventAccumulator(logger.log_dir)
    read.Reload()
    assert len(read.Scalars("loss")) == 10


# ---- Weights & Biases, without a network


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")

    def make(name):
        (tmp_path / name).mkdir()
        return WandbLogger(name=name, project="tests", save_dir=tmp_path / name, offline=True)

    yield make
    wandb.finish()


KEPT = ("loss", "val_loss", "epoch", "trainer/global_step")


def watched(offline, name, strategy, **options):
    """A run whose weights and gradients W&B watches; its rows and final weights."""
    logger = offline(name)
    module = made()
    logger.watch(module, log="all", log_freq=1)
    fit(module, strategy, val=loader(24), logger=logger, log_every_n_steps=1, max_epochs=2, **options)
    run = logger.experiment
    run.unwatch(module)
    run.finish()
    rows = read_run(run.settings.sync_file).rows
    # from the second model that is watched in a process on, W&B numbers them
    return [{re.sub(r"graph_\d+", "", key): v for key, v in row.items()} for row in rows], weights(module)


def test_wandb_watches_gradients_of_all_stages_and_changes_no_number(offline):
    rows, end = watched(offline, "ours", dni())
    module = made()
    fit(module, dni(), val=loader(24), max_epochs=2)
    assert different(end, weights(module)) == []
    seen = {key.rpartition(".")[0] for row in rows for key in row if key.startswith("gradients/")}
    assert seen == {f"gradients/{name}" for name, _ in module.named_parameters()}


def test_wandb_gets_the_rows_of_the_plain_trainer_at_lambda_one(offline):
    plain, plain_end = watched(offline, "plain", "auto")
    ours, our_end = watched(offline, "ours", dni(bp_lambda=1.0, estimator=MLP))
    assert different(plain_end, our_end) == []
    assert len(plain) == len(ours)
    for one, other in zip(plain, ours, strict=True):
        assert set(one) == set(other)
        assert [one.get(key) for key in KEPT] == [other.get(key) for key in KEPT]
        assert {k: v for k, v in one.items() if k.startswith("gradients/")} == {
            k: v for k, v in other.items() if k.startswith("gradients/")
        }


# ---- notebooks


@pytest.mark.skipif(not find_spec("IPython"), reason="IPython is not installed")
def test_a_cell_of_a_notebook_can_be_run_twice():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.user_ns.update(dni=dni, fit=fit, net=net)
    for _ in range(2):
        result = shell.run_cell("import lightning_dni\nmodule = net()\nfit(module, dni())")
        result.raise_error()


def test_code_that_is_run_again_in_one_process_starts_afresh():
    """What a notebook does with its cell, without one: the same text twice in one namespace."""
    namespace, ends = {"dni": dni, "fit": fit, "net": net, "weights": weights}, []
    for _ in range(2):
        exec("import lightning_dni\nmodule = net()\nfit(module, dni())\nend = weights(module)", namespace)
        ends.append(namespace["end"])
    assert different(*ends) == []


def test_a_trainer_in_a_notebook_may_be_used_for_several_modules():
    trainer, ends = quiet_trainer(dni()), []
    for _ in range(2):
        module = net()
        trainer.fit_loop.epoch_progress.reset()
        torch.manual_seed(0)
        trainer.fit(module, loader())
        ends.append(weights(module))
    assert different(*ends) == []
