"""An offline W&B run, read back from its file: rows, axes, configuration, summaries, picture, resuming."""

import warnings
from pathlib import Path

import pytest
import wandb
from callbacks.runs import AGGREGATES, KEYS, SPEED, csv_rows, read_run, rows_with
from fits import BOUNDARIES, dni, fit, loader, net
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_dni.callbacks import BPLambdaScheduler, GradientMonitor, LinearWarmup

AXIS = "trainer/global_step"
EPOCH = loader(104)  # 13 steps


@pytest.fixture(autouse=True)
def _own_run(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    yield
    wandb.finish()  # else the next logger takes the run over


def offline(**options):
    # a whole path: wandb's service stays where the first run of the process was started
    return WandbLogger(project="test", save_dir=Path.cwd(), offline=True, **options)


def trained(logger, max_epochs=2, ckpt_path=None, callbacks=(), **options):
    """Fit with a monitor and close the run; returns the file read back, and the trainer."""
    callbacks = [GradientMonitor(2, recipe="test"), *callbacks]
    options = {"logger": logger, "log_every_n_steps": 2, **options}
    trainer = fit(
        net(), dni(), EPOCH, max_epochs=max_epochs, ckpt_path=ckpt_path, callbacks=callbacks, **options
    )
    run = next(each for each in trainer.loggers if isinstance(each, WandbLogger)).experiment
    wandb.finish()
    return read_run(run.settings.sync_file), trainer


def test_run_holds_rows_axes_configuration_summaries_and_picture():
    csv = CSVLogger(".")
    run, _ = trained([offline(), csv], callbacks=[BPLambdaScheduler(LinearWarmup(4))])
    rows, twins = run.by_step(), csv_rows(csv)
    for key in [*KEYS, *AGGREGATES, "dni_bp_lambda/net_0", "dni_bp_lambda/net_1"]:
        steps = [step for step, row in rows.items() if key in row]
        assert steps == list(range(1, 26, 2)), key
        assert [rows[s][key] for s in steps] == pytest.approx([twins[s][key] for s in steps]), key
    for key in SPEED:  # of the steps 0 and 13 alone nothing is timed: warm-up, and a new epoch
        assert {step for step, row in rows.items() if key in row} >= {3, 5, 7, 9, 11, 15, 17, 25}, key
    assert run.axes["dni_*"] == AXIS

    found = run.config["dni"]
    assert found["boundaries"] == BOUNDARIES
    assert found["estimators"] == {"net_0": "LinearEstimator", "net_1": "LinearEstimator"}
    assert found["estimator_parameters"] == {"net_0": 96, "net_1": 96}
    assert found["optimizer"] == {"name": "SGD", "lr": 0.1}
    assert found["estimator_optimizer"] == {"name": "Adam", "lr": 1e-3}
    assert (found["staleness"], found["recipe"]) == (0, "test")
    assert found.keys() >= {"bp_lambda", "seed", "versions"}

    for key in [*KEYS, *AGGREGATES, "dni_step_time", "dni_samples_per_second"]:
        last_ten = [row[key] for row in rows.values() if key in row][-10:]
        assert run.summary[key] == pytest.approx(sum(last_ten) / 10, rel=1e-5), key

    image = next(row for row in run.rows if "dni_gradients.path" in row)
    assert image[AXIS] == 25
    files = Path(next(Path("wandb").glob("offline-run-*"))) / "files"
    assert (files / image["dni_gradients.path"]).read_bytes()[:4] == b"\x89PNG"
    assert [str(path.parent) for path in Path().rglob("dni_gradients.png")] == [str(Path(csv.log_dir))]


def test_defaults_of_monitor_trainer_and_loggers_line_up():
    logger, csv = offline(), CSVLogger(".")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*GradientMonitor.*")
        options = {"callbacks": [GradientMonitor()], "logger": [logger, csv]}
        fit(net(), dni(), loader(1600, batch_size=16), **options)
    run = logger.experiment
    wandb.finish()
    rows = read_run(run.settings.sync_file).by_step()
    assert [step for step, row in rows.items() if "dni_mean_cosine" in row] == [49, 99]
    assert rows_with(csv_rows(csv), "dni_mean_cosine") == [49, 99]


def test_resuming_with_the_same_id_continues_the_run():
    first, trainer = trained(offline(id="same"), max_epochs=1)
    trainer.save_checkpoint("half.ckpt")
    second, _ = trained(offline(id="same"), ckpt_path="half.ckpt")
    assert first.id == second.id == "same"
    key = "dni_sg_error/net_0"
    rows = [{s: row[key] for s, row in run.by_step().items() if key in row} for run in (first, second)]
    assert list(rows[0]) == [1, 3, 5, 7, 9, 11]
    assert list(rows[1]) == [13, 15, 17, 19, 21, 23, 25]
    last_ten = list((rows[0] | rows[1]).values())[-10:]
    assert second.summary[key] == pytest.approx(sum(last_ten) / 10, rel=1e-5)
