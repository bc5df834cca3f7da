"""Copies of a whole pipeline, data-parallel: together they do what one process does on the joint batch."""

import warnings
from functools import partial

import pytest
import torch
import torchmetrics
from callbacks.runs import csv_rows
from fits import CLASSES, LINEAR, Net, dataset, fit, net, quiet_trainer, weights
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from processes import on_ranks
from strategies.pipelined import STAGES, in_turn, once, pipeline
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_dni import DNIPipelineStrategy, DNIStrategy, GradientMonitor
from lightning_dni.estimators import (
    CriticCascade,
    CriticEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
)

AGAINST_TARGET = ("dni_sg_loss", "dni_target_error", "dni_target_cosine")
AGAINST_TRUE = (
    *("dni_sg_error", "dni_true_gradient_cosine", "dni_row_cosine", "dni_norm_ratio", "dni_bootstrap_error"),
    *("dni_weight_cosine", "dni_weight_error"),
)


def part(copy, rows=80):
    """Every second row of each batch of eight."""
    return DataLoader(Subset(dataset(rows), range(copy, rows, 2)), 4)


def fit_copy(rank, case, copies=2):
    """One of the processes; where there is one copy, it reads the joint batch."""
    stages, options, accumulate = CASES[case]
    module = net().double()
    trainer = quiet_trainer(
        pipeline(stages, **options),
        devices=copies * stages,
        max_epochs=2,
        use_distributed_sampler=False,
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    torch.manual_seed(0)
    trainer.fit(module, part(rank % 2) if copies == 2 else DataLoader(dataset(), 8))
    return weights(module), estimators_of(trainer)


def estimators_of(trainer):
    return {name: weights(e) for name, e in trainer.strategy.engine.estimators.items()}


def critic(spec):
    return CriticEstimator(spec, CLASSES)


cascade = partial(CriticCascade, num_classes=CLASSES)
CASES = {
    "two": (2, {}, 1),
    "mixed-accumulated": (2, {"bp_lambda": 0.5}, 2),
    "critic": (2, {"estimator": critic}, 1),
    "direct feedback alignment": (2, {"estimator": DirectFeedbackAlignmentEstimator}, 1),
    "exact": (2, {"schedule": "1f1b", "microbatches": 2, "estimator": None, "staleness": 2}, 1),
    "exact-accumulated": (2, {"schedule": "gpipe", "microbatches": 4, "estimator": None, "staleness": 2}, 2),
    "stale": (2, {"staleness": 2}, 1),
    "stale critic-accumulated": (2, {"staleness": 2, "estimator": critic}, 2),
    "alignment, cascade": (3, {"estimator": {"net.0": FeedbackAlignmentEstimator, "*": cascade}}, 1),
    "three": (3, {}, 1),
}


@once
def copied(stages):
    """Every case with so many stages, two copies of which are fitted in one set of processes."""
    mine = [name for name, case in CASES.items() if case[0] == stages]
    return in_turn(2 * stages, {name: partial(fit_copy, case=name) for name in mine})


@once
def lagging():
    """One copy each of what no other strategy does in one process."""
    stale = [name for name, (_, options, _) in CASES.items() if name.startswith("stale")]
    return in_turn(2, {name: partial(fit_copy, case=name, copies=1) for name in stale})


def on_the_joint_batch(case):
    """Weights, and those of the estimators, without copies."""
    stages, options, accumulate = CASES[case]
    if case.startswith("stale"):
        found = lagging()[case]
        return found[0][0], {name: e for _, estimators in found for name, e in estimators.items()}
    module, given = net().double(), {"max_epochs": 2, "precision": "64-true"}
    given["accumulate_grad_batches"] = accumulate
    if "schedule" in options:
        fit(module, "auto", DataLoader(dataset(), 8), **given)
        return weights(module), {}
    strategy = DNIStrategy(**{"boundaries": STAGES[stages], "estimator": LINEAR, "rng": "stage", **options})
    trainer = fit(module, strategy, DataLoader(dataset(), 8), **given)
    return weights(module), estimators_of(trainer)


@pytest.mark.parametrize("case", CASES)
def test_copies_do_what_is_done_without_them_on_the_joint_batch(case):
    found = copied(CASES[case][0])[case]
    expected, teachers = on_the_joint_batch(case)
    for own, estimators in found:
        for name, value in own.items():
            torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)
            assert torch.equal(value, found[0][0][name]), name
        for boundary, estimator in estimators.items():
            for name, value in teachers[boundary].items():
                torch.testing.assert_close(estimator[name], value, atol=1e-10, rtol=0)
    assert {name for _, estimators in found for name in estimators} == set(teachers)


def fit_clipped(rank, copies):
    warnings.simplefilter("ignore")
    module = net().double()
    trainer = quiet_trainer(
        pipeline(2, clip_norm="lagged"),
        devices=2 * copies,
        max_epochs=2,
        use_distributed_sampler=False,
        precision="64-true",
        gradient_clip_val=0.05,
    )
    trainer.fit(module, part(rank % 2) if copies == 2 else DataLoader(dataset(), 8))
    return weights(module)


def unclipped():
    module = net().double()
    strategy = DNIStrategy(STAGES[2], LINEAR, rng="stage")
    fit(module, strategy, DataLoader(dataset(), 8), max_epochs=2, precision="64-true")
    return weights(module)


def test_copies_clip_by_the_lagged_norm_of_the_joint_batch():
    joint, _ = on_ranks(fit_clipped, 1, grouped=False)
    assert any(not torch.equal(joint[name], loose) for name, loose in unclipped().items())
    for own in on_ranks(fit_clipped, 2, world_size=4, grouped=False, seconds=120):
        for name, value in own.items():
            torch.testing.assert_close(value, joint[name], atol=1e-10, rtol=0)


def fit_watched(rank, folder):
    warnings.simplefilter("ignore")
    module, logger = net().double(), CSVLogger(folder, name="copies")
    trainer = quiet_trainer(
        pipeline(3),
        devices=6,
        max_epochs=1,
        use_distributed_sampler=False,
        precision="64-true",
        callbacks=[GradientMonitor(1, probe=True)],
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(module, part(rank % 2))
    return csv_rows(logger) if rank == 0 else None


def test_the_monitor_of_copies_shows_what_one_process_sees_on_the_joint_batch(tmp_path):
    rows, *_ = on_ranks(fit_watched, tmp_path, world_size=6, grouped=False, seconds=120)
    module, logger = net().double(), CSVLogger(tmp_path, name="one")
    strategy = DNIStrategy(STAGES[3], LINEAR, rng="stage")
    watching = {"callbacks": [GradientMonitor(1, probe=True)], "logger": logger, "log_every_n_steps": 1}
    fit(module, strategy, DataLoader(dataset(), 8), max_epochs=1, precision="64-true", **watching)
    expected = csv_rows(logger)
    figures = [f"{m}/{name}" for m in (*AGAINST_TARGET, *AGAINST_TRUE) for name in ("net_0", "net_1")]
    for step in range(1, 10):  # figures arrive a step later
        found = {key: rows[step][key] for key in figures}
        assert found == pytest.approx({key: expected[step - 1][key] for key in found}, rel=1e-8, abs=1e-9)


# ---- metrics in the module


class Counted(Net):
    """Has metrics that Lightning computes, and others that a hook computes, of several kinds of states."""

    def __init__(self):
        super().__init__(optimizer="adam")
        kinds = {"precision": torchmetrics.Precision, "accuracy": torchmetrics.Accuracy}
        made = {name: kind("multiclass", num_classes=CLASSES) for name, kind in kinds.items()}
        self.counts = torchmetrics.MetricCollection(made)
        self.hits = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.tops, self.mean = torchmetrics.CatMetric(), torchmetrics.MeanMetric()
        self.own = torchmetrics.SumMetric(sync_on_compute=False)
        self.computed = []

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.hits(out, batch[1])
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("hits", self.hits, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.computed.append(self.mean.compute().item())
        self.mean.reset()

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.counts(out, batch[1])
        self.tops.update(out.max(1).values)
        self.own.update(1.0)
        self.log("val_loss", F.cross_entropy(out, batch[1]), sync_dist=True)
        self.log_dict(self.counts)

    def on_validation_epoch_end(self):
        self.computed += sorted(self.tops.compute().tolist())
        self.computed += [value.item() for value in self.counts.compute().values()]
        self.computed.append(self.own.compute().item())
        self.tops.reset()


def fit_counted(folder, strategy, train, val, **trainer):
    """What a fit has come to that decides by what metrics say."""
    torch.manual_seed(0)
    module = Counted().double()
    stopping = EarlyStopping("accuracy", patience=1, mode="max")
    checkpoint = ModelCheckpoint(folder, monitor="hits", mode="max", filename="{step}-{hits:.4f}")
    made = quiet_trainer(
        strategy,
        max_epochs=6,
        precision="64-true",
        callbacks=[stopping, checkpoint],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **trainer,
    )
    made.fit(module, train, val)
    values = {name: value.item() for name, value in made.callback_metrics.items() if name != "loss_step"}
    return {
        "values": values,
        "computed": module.computed,
        "best": checkpoint.best_model_path.rsplit("/", 1)[-1],
        "stopped": stopping.stopped_epoch,
        "groups": {m.process_group for m in module.modules() if isinstance(m, torchmetrics.Metric)},
    }


COUNTING = {
    "dni": (partial(pipeline, 2), partial(DNIStrategy, STAGES[2], LINEAR, rng="stage")),
    "1f1b": (
        partial(DNIPipelineStrategy, STAGES[2], schedule="1f1b", microbatches=2),
        partial(DNIStrategy, STAGES[2], LINEAR, rng="stage", bp_lambda=1.0),
    ),
}


@once
def counted():
    """The fits of all schedules in one set of processes, two stages of two copies."""

    def scene(rank, name, make):
        copies = {"devices": 4, "use_distributed_sampler": False}
        return fit_counted(name, make(), part(rank % 2), part(rank % 2, 16), **copies)

    return in_turn(
        4, {name: partial(scene, name=name, make=make) for name, (make, _) in COUNTING.items()}, 120
    )


@pytest.mark.parametrize("schedule", COUNTING)
def test_metrics_of_copies_have_seen_the_rows_of_all_and_every_rank_decides_alike(schedule):
    joint = DataLoader(dataset(), 8), DataLoader(dataset(16), 8)
    alone = fit_counted("alone", COUNTING[schedule][1](), *joint)
    assert alone["stopped"] > 0
    assert len(set(alone["computed"])) > len(alone["computed"]) / 2
    for found in counted()[schedule]:
        assert found["values"] == pytest.approx(alone["values"], abs=1e-6)
        assert found["computed"] == pytest.approx(alone["computed"], abs=1e-6)
        assert {k: found[k] for k in ("best", "stopped", "groups")} == {
            k: alone[k] for k in ("best", "stopped", "groups")
        }


class Gathering(Net):
    """Gathers over processes where only the last stage comes, and where all stages come."""

    def __init__(self):
        super().__init__()
        self.own, self.seen, self.ends = [], [], []

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.own.append(out)
        self.seen.append(self.all_gather(out))
        self.log("val_loss", F.cross_entropy(out, batch[1]), sync_dist=True)

    def on_validation_epoch_end(self):
        self.ends.append(self.all_gather(torch.tensor(self.global_rank)).tolist())


def fit_gathering(rank):
    module = Gathering().double()
    trainer = quiet_trainer(
        pipeline(2), devices=4, max_epochs=1, use_distributed_sampler=False, precision="64-true"
    )
    trainer.fit(module, part(rank % 2), part(rank % 2, 16))
    return module.own, module.seen, module.ends


def test_what_copies_gather_is_of_the_same_stage():
    """Behind the boundary the outputs of both copies; where all come, the copies of each stage."""
    found = on_ranks(fit_gathering, world_size=4)
    last = [each for each in found if each[0]]
    assert len(last) == 2
    for _, seen, _ in last:
        for number, gathered in enumerate(seen):
            assert gathered.shape == (2, 4, CLASSES)
            for copy, (own, _, _) in enumerate(last):
                assert torch.equal(gathered[copy], own[number])
    assert {tuple(ends[-1]) for _, _, ends in found} == {(0, 1), (2, 3)}
