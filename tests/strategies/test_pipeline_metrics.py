"""Whatever decides by a logged value decides alike on every rank, and as in one process."""

import csv
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from callbacks.runs import read_run
from fits import CLASSES, Net, different, dni, fit, loader, net, weights
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from processes import TIMEOUT, on_ranks
from strategies.staged_fits import BELOW, fit_staged, on_stages, staged
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dni.strategies.copies import Copies
from lightning_dni.strategies.placement import Place

SYNCHRONOUS = partial(staged, staleness=0)


class Measured(Net):
    """Logs in every way there is, with values in single and in double precision."""

    def __init__(self, interval="epoch", monitor="val_loss"):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.mean = torchmetrics.MeanMetric()
        self.interval, self.monitor, self.computed = interval, monitor, []

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.accuracy(out, batch[1])
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("double", loss.detach().double() / 3)
        return loss

    def on_train_epoch_end(self):
        self.computed.append(self.mean.compute().item())
        self.log("mean", self.computed[-1])
        self.mean.reset()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.05)
        how = {"scheduler": schedule, "monitor": self.monitor, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": how}


class Rates(pl.Callback):
    """The learning rate after each batch."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def measured(**options):
    torch.manual_seed(0)
    return Measured(**options)


def in_one_process(stages=2, **options):
    return dni(boundaries=BELOW[stages], rng="stage", **options)


def everything(how, module, rank=0, **options):
    """What a fit has come to, in one process or in one of several."""
    checkpoint = ModelCheckpoint(
        f"best{how}", monitor="val_loss", filename="{step}-{val_loss:.4f}", save_top_k=2
    )
    stopping, rates = EarlyStopping("val_loss", min_delta=0.05, patience=2), Rates()
    callbacks = [stopping, rates, checkpoint]
    given = {"enable_checkpointing": True, "max_epochs": 6, "callbacks": callbacks, **options}
    make = partial(fit, strategy=in_one_process()) if how == "one" else fit_staged
    if how == "staged":
        given["strategy"] = SYNCHRONOUS()
    trainer = make(module=module, train=loader(), val=loader(16), **given)
    return {
        "values": {k: v.item() for k, v in trainer.callback_metrics.items()},
        "best": checkpoint.best_model_path.rsplit("/", 1)[-1],
        "kept": sorted(path.rsplit("/", 1)[-1] for path in checkpoint.best_k_models),
        "waited": stopping.wait_count,
        "stopped": stopping.stopped_epoch,
        "rates": rates.rates,
        "step": trainer.global_step,
        "computed": module.computed,
        "weights": {n: w.tolist() for n, w in weights(module).items()},
    }


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_all_ranks_come_to_what_one_process_comes_to(interval):
    monitor = {"epoch": "val_loss", "step": "loss"}[interval]
    alone = everything("one", measured(interval=interval, monitor=monitor))
    found = on_stages(lambda rank: everything("staged", measured(interval=interval, monitor=monitor)))
    assert len(set(alone["rates"])) > 1
    assert alone["stopped"] > 0
    for rank, said in enumerate(found):
        assert {k: v for k, v in said.items() if v != alone[k]} == {}, f"rank {rank}"


def test_values_keep_their_precision_on_the_way():
    found = on_stages(lambda rank: fit_staged(module=measured(), val=loader(16)).callback_metrics["double"])
    assert found[0].dtype == found[1].dtype == torch.float64
    assert found[0].item() == found[1].item() != found[0].float().item()


def steps_saved(rank, options):
    checkpoint = ModelCheckpoint("steps", save_top_k=-1, every_n_train_steps=3, **options)

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.log("late", float(10 - batch_idx))

    callbacks = [Logs(), checkpoint]
    fit_staged(callbacks=callbacks, enable_checkpointing=True)
    return checkpoint.best_model_path, sorted(checkpoint.best_k_models)


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": "loss"},
        {"monitor": "late", "filename": "{step}-{late:.1f}"},
        {"filename": "{step}-{loss:.5f}"},
    ],
    ids=["monitor", "logged by a callback", "only named by it"],
)
def test_checkpoints_at_steps_agree(options, tmp_path):
    found = on_stages(steps_saved, options)
    assert found[0] == found[1]
    best, kept = found[0]
    assert len(list((tmp_path / "steps").iterdir())) == 3
    assert best
    assert len(kept) in (0, 3)


# ---- metrics in the module


def test_the_best_checkpoint_is_tested_on_all_ranks_and_results_are_those_of_one_process():
    def body(rank, strategy=None):
        checkpoint = ModelCheckpoint("best", monitor="val_loss")
        options = {"callbacks": [checkpoint], "enable_checkpointing": True, "max_epochs": 2}
        module = net()
        if strategy is None:
            strategy = SYNCHRONOUS()
            trainer = fit_staged(module=module, val=loader(16), strategy=strategy, **options)
        else:
            trainer = fit(module, strategy, loader(), loader(16), **options)
        tested = trainer.test(module, loader(24), ckpt_path="best", verbose=False)
        validated = trainer.validate(module, loader(24), verbose=False)
        value = trainer.callback_metrics["val_loss"].item()
        predicted = trainer.predict(module, loader(24))
        said = [p if p is None else p.tolist() for p in predicted]
        return tested, validated, said, value

    alone = body(0, in_one_process())
    first, second = on_stages(body)
    assert first == alone
    assert second[2] == [None, None, None]
    assert second[3] == alone[3]


def test_a_metric_that_hooks_compute_has_its_value_on_every_rank():
    class Best(Measured):
        def __init__(self):
            super().__init__()
            self.top = torchmetrics.MaxMetric()

        def validation_step(self, batch, batch_idx):
            out = self(batch[0])
            self.top.update(out.max())
            self.log("val_loss", F.cross_entropy(out, batch[1]))

        def on_validation_epoch_end(self):
            self.computed.append(self.top.compute().item())
            self.top.reset()

    def body(rank):
        torch.manual_seed(0)
        module = Best()
        fit_staged(module=module, val=loader(16), max_epochs=2)
        return module.computed, module.mean.distributed_available_fn() is not None

    found = on_stages(body)
    assert found[0] == found[1]
    assert len(set(found[0][0])) == len(found[0][0]) == 4


# ---- what steps gather


class Gathers(Net):
    """Gathers behind the boundary, where only the last stage comes, and where all stages come."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.cross_entropy(self.all_gather(out, sync_grads=True), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append(self.all_gather({"loss": loss})["loss"])

    def on_validation_epoch_end(self):
        if self.trainer.is_global_zero:
            self.log("val_loss", torch.stack(self.seen).mean())
        self.seen.clear()
        self.log("one", self.all_gather(1.0))


def test_gathering_waits_for_no_other_stage():
    def body(rank, strategy=None):
        torch.manual_seed(0)
        module = Gathers()
        if strategy is None:
            trainer = fit_staged(module=module, val=loader(16), strategy=SYNCHRONOUS())
        else:
            trainer = fit(module, strategy, loader(), loader(16))
        return weights(module), {name: value.item() for name, value in trainer.callback_metrics.items()}

    expected, values = body(0, in_one_process())
    assert values.keys() == {"loss", "val_loss", "one"}
    for found, said in on_stages(body):
        assert different(found, expected) == []
        assert said == values


def test_copies_of_a_stage_gather_from_each_other():
    def body(rank):
        strategy = staged()
        strategy._copies = Copies(Place.of_stages(rank, 2, 1), TIMEOUT, torch.device("cpu"))
        return [
            strategy.all_gather(torch.tensor([rank]), group).tolist() for group in (None, dist.group.WORLD)
        ]

    assert on_ranks(body) == [[[[0], [1]]] * 2] * 2


# ---- loggers


def logged(rank):
    logger = CSVLogger("csv", flush_logs_every_n_steps=1)
    rates = LearningRateMonitor("step")
    fit_staged(
        module=measured(), val=loader(16), max_epochs=2, logger=logger, callbacks=[rates], log_every_n_steps=1
    )


def test_a_csv_logger_writes_every_row_once(tmp_path):
    on_stages(logged)
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row["loss_step"]]
    assert steps == list(range(20))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [9, 19]
    assert sum(bool(row["lr-SGD"]) for row in rows) == 20


def test_weights_and_biases_gets_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")

    def body(rank):
        logger = WandbLogger(save_dir=tmp_path, offline=True, project="tests")
        fit_staged(module=measured(), val=loader(16), max_epochs=2, logger=logger, log_every_n_steps=1)
        if rank == 0:
            logger.experiment.finish()

    on_stages(body, seconds=90)
    files = list(tmp_path.rglob("run-*.wandb"))
    assert len(files) == 1
    rows = read_run(files[0]).rows
    assert [row["trainer/global_step"] for row in rows if "loss_step" in row] == list(range(20))
    assert sum("val_loss" in row for row in rows) == 2
