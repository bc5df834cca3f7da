"""GradientMonitor over processes: the figures of one process, a few steps later, and nothing else changes."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import wandb
from callbacks.runs import csv_rows, read_run, rows_with
from fits import BOUNDARIES, LINEAR, different, dni, fit, loader, net, quiet_trainer, weights
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from processes import on_ranks
from strategies.pipelined import pipeline

from lightning_dni import GradientMonitor
from lightning_dni.estimators import CriticEstimator

CLASSES = 3
AGAINST_TARGET = ["dni_sg_loss", "dni_target_error", "dni_target_cosine"]
AGAINST_TRUE = [
    "dni_sg_error",
    "dni_true_gradient_cosine",
    "dni_row_cosine",
    "dni_zero_rows",
    "dni_norm_ratio",
    "dni_bootstrap_error",
    "dni_weight_cosine",
    "dni_weight_error",
]
SHARES = ["dni_busy", "dni_wait_in", "dni_wait_out"]


def keys(metrics):
    return [f"{metric}/{name}" for metric in metrics for name in ("net_0", "net_1")]


def shares(stages=3):
    return [f"{what}/stage_{k}" for what in SHARES for k in range(stages)]


def monitored_stage(rank, every_n, probe, options, fit_options):
    """One process of a fit that is watched, or not; what its loggers have written."""
    warnings.simplefilter("ignore")
    os.environ["PL_GLOBAL_SEED"] = "0"
    os.environ |= {"WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}
    monitors = [] if every_n is None else [GradientMonitor(every_n, probe, recipe="test")]
    wants_wandb = fit_options.pop("wandb", False)
    csv = CSVLogger(".")
    loggers = [csv, WandbLogger(project="t", save_dir=Path.cwd(), offline=True)] if wants_wandb else [csv]
    options = {"staleness": 0, **options}
    module, batches = net(dropout=0.2), fit_options.pop("batches", 10)
    trainer = quiet_trainer(
        pipeline(3, **options),
        devices=3,
        callbacks=monitors,
        logger=loggers,
        log_every_n_steps=every_n or 1,
        use_distributed_sampler=False,
        **fit_options,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(8 * batches))
    file = None
    if wants_wandb and rank == 0:
        file = str(loggers[1].experiment.settings.sync_file)
        wandb.finish()
    return {
        "rows": csv_rows(csv) if rank == 0 else {},
        "logged": {name for name in trainer.logged_metrics if name.startswith("dni_")},
        "history": [each.state_dict() for each in monitors[0].history] if monitors else [],
        "weights": weights(module),
        "estimators": {n: weights(e) for n, e in trainer.strategy.engine.estimators.items()},
        "file": file,
        "files": [str(path) for path in Path().rglob("dni_gradients.png")],
    }


def watched(every_n=1, probe=None, options=None, seconds=90, **fit_options):
    """What every rank has to say, rank 0 first."""
    return on_ranks(
        *(monitored_stage, every_n, probe, options or {}, fit_options),
        world_size=3,
        grouped=False,
        seconds=seconds,
    )


def in_one_process(every_n=1, batches=10, **options):
    logger, monitor = CSVLogger(".", name="one"), GradientMonitor(every_n)
    watching = {"callbacks": [monitor], "logger": logger, "log_every_n_steps": every_n}
    fit(net(dropout=0.2), dni(rng="stage", seed=0), loader(8 * batches), **watching, **options)
    return csv_rows(logger), monitor


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_lag_figures_are_those_of_one_process_a_step_later(accumulate):
    options = {"accumulate_grad_batches": accumulate}
    rows = watched(**options)[0]["rows"]
    expected, _ = in_one_process(**options)
    steps = rows_with(rows, "dni_target_error/net_0")
    assert steps == list(range(1, 10 // accumulate))
    for step in steps:
        for key in keys(AGAINST_TARGET):
            assert rows[step][key] == pytest.approx(expected[step - 1][key], rel=1e-6, abs=1e-9), (step, key)
        assert [rows[step][key] for key in keys(["dni_staleness"])] == [0, 0]


def test_rows_are_where_the_trainer_writes_them_and_say_how_old_targets_were():
    first, *others = watched(4, options={"staleness": 2}, batches=13, wandb=True)
    rows = first["rows"]
    for key in [*keys([*AGAINST_TARGET, "dni_staleness"]), *shares()]:
        assert rows_with(rows, key) == [3, 7, 11], key
    assert not any(key in row for row in rows.values() for key in keys(AGAINST_TRUE))
    assert {rows[7][key] for key in keys(["dni_staleness"])} == {2.0}
    for step in (3, 7, 11):
        for stage in range(3):
            parts = [rows[step][f"{what}/stage_{stage}"] for what in SHARES]
            assert all(0 <= part <= 1 for part in parts)
            assert 0 < sum(parts) <= 1
            assert parts[0] > 0
    assert first["files"] == []
    for other in others:
        assert (other["logged"], other["history"], other["files"]) == (set(), [], [])
    run = read_run(first["file"])
    assert [s for s, row in run.by_step().items() if "dni_target_cosine/net_1" in row] == [3, 7, 11]
    found = run.config["dni"]
    assert found["boundaries"] == BOUNDARIES
    assert found["estimators"] == {"net_0": "LinearEstimator", "net_1": "LinearEstimator"}
    assert found["estimator_parameters"] == {"net_0": 96, "net_1": 96}
    assert found["estimator_optimizer"] == {"name": "Adam", "lr": 1e-3}
    assert (found["staleness"], found["stages"], found["schedule"]) == (2, 3, "dni")
    assert run.summary["dni_busy/stage_0"] > 0


def test_a_watched_run_is_the_same_bits():
    plain, seen = watched(None, options={"staleness": 1}), watched(2, options={"staleness": 1})
    assert plain[0]["rows"]
    for one, other in zip(plain, seen, strict=True):
        assert different(one["weights"], other["weights"]) == []
        for name in one["estimators"]:
            assert different(one["estimators"][name], other["estimators"][name]) == []


def critics_below(spec):
    return CriticEstimator(spec, CLASSES) if spec.name == "net.0" else LINEAR(spec)


def test_figures_of_an_estimator_that_hears_late_come_in_a_later_row():
    rows = watched(5, options={"staleness": 1, "estimator": critics_below}, batches=20)[0]["rows"]
    assert rows_with(rows, "dni_sg_loss/net_1") == [4, 9, 14, 19]
    assert rows_with(rows, "dni_sg_loss/net_0") == [9, 14, 19]
    assert {row["dni_staleness/net_0"] for row in rows.values() if "dni_staleness/net_0" in row} == {2.0}
