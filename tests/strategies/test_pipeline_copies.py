"""Copies of a whole pipeline, data-parallel: together they do what one process does on the joint batch."""

import warnings
from functools import partial

import pytest
import torch
from callbacks.runs import csv_rows
from fits import CLASSES, LINEAR, dataset, fit, net, quiet_trainer, weights
from lightning.pytorch.loggers import CSVLogger
from processes import on_ranks
from strategies.pipelined import STAGES, pipeline
from torch.utils.data import DataLoader, Subset

from lightning_dni import DNIStrategy, GradientMonitor
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


def fit_copy(rank, stages, options, accumulate):
    warnings.simplefilter("ignore")
    module = net().double()
    trainer = quiet_trainer(
        pipeline(stages, **options),
        devices=2 * stages,
        max_epochs=2,
        use_distributed_sampler=False,
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, part(rank % 2))
    estimators = trainer.strategy.engine.estimators
    return weights(module), {n: weights(e) for n, e in estimators.items()}


def critic(spec):
    return CriticEstimator(spec, CLASSES)


cascade = partial(CriticCascade, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("stages", "options", "accumulate"),
    [
        (2, {}, 1),
        (2, {"bp_lambda": 0.5}, 2),
        (2, {"estimator": critic}, 1),
        (2, {"estimator": DirectFeedbackAlignmentEstimator}, 1),
        (3, {"estimator": {"net.0": FeedbackAlignmentEstimator, "*": cascade}}, 1),
        (3, {}, 1),
    ],
    ids=["two", "mixed-accumulated", "critic", "direct feedback alignment", "alignment, cascade", "three"],
)
def test_copies_do_what_one_process_does_on_the_joint_batch(stages, options, accumulate):
    found = on_ranks(fit_copy, stages, options, accumulate, world_size=2 * stages, grouped=False, seconds=120)
    module = net().double()
    strategy = DNIStrategy(**{"boundaries": STAGES[stages], "estimator": LINEAR, "rng": "stage", **options})
    trainer = fit(
        module,
        strategy,
        DataLoader(dataset(), 8),
        max_epochs=2,
        precision="64-true",
        accumulate_grad_batches=accumulate,
    )
    expected = weights(module)
    for own, estimators in found:
        for name, value in own.items():
            torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=0)
            assert torch.equal(value, found[0][0][name]), name
        for boundary, estimator in estimators.items():
            for name, value in weights(trainer.strategy.engine.estimators[boundary]).items():
                torch.testing.assert_close(estimator[name], value, atol=1e-10, rtol=0)
    assert {name for _, estimators in found for name in estimators} == set(STAGES[stages])


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
