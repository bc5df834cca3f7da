"""The loop over runs: what has finished is kept, changes are noticed, failures are told, Ctrl-C stops."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from study.parts import CALL, FIT, Counted, calls, rows, study

from lightning_dni.cli import build, run

TESTS = Path(__file__).parents[1]
KILLED = CALL.replace("parts.figures", "parts.killed_once")
STOPPED = CALL.replace("parts.figures", "parts.interrupted_once")
FAILING = CALL.replace('seed: "${run.seed}"', 'seed: "${run.seed}", fails_at: 1.0')
MANY = FIT.replace("seeds: [0]", "seeds: [0, 1]")


def finished(folder="runs/toy"):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/result.json")}


def test_finished_runs_are_not_repeated():
    assert study(CALL) == 0
    assert calls() == [f"{rate} {seed}" for rate in (0.5, 1.0) for _ in "ab" for seed in (0, 1)]
    before = finished()
    assert study(CALL) == 0
    assert study(CALL.replace("kind: [a, b]", "kind: [a, b, c]")) == 0  # a longer axis adds runs
    assert len(calls()) == 8 + 4
    assert before.items() <= finished().items()
    assert len(rows()) == 12


def test_a_bar_counts_the_runs_and_is_full_at_once_where_all_have_finished(capsys):
    assert study(CALL) == 0
    bars = capsys.readouterr().err.split("\r")
    for count in (0, 8):
        assert any(re.match(rf"toy: .*\b{count}/8 \[.*(run/s|s/run)", bar) for bar in bars), bars
    assert any("rate=0.5,kind=a,seed=1" in bar for bar in bars)
    assert study(CALL) == 0
    again = capsys.readouterr().err
    assert "8/8 [" in again
    assert "rate=" not in again  # nothing is being run
    assert len(calls()) == 8
    *_, last = again.split("\r")
    seconds = re.search(r"8/8 \[00:(\d\d)<", last)
    assert seconds is not None
    assert int(seconds[1]) < 5


def test_the_data_of_a_run_is_gone_before_the_next_but_one():
    many = FIT.replace("seeds: [0]", "seeds: [0, 1, 2, 3]")
    gc.disable()
    try:
        assert study(many.replace("lightning_dni.demos.DigitsDataModule", "study.parts.Counted")) == 0
    finally:
        gc.enable()
    assert 1 <= Counted.most <= 2


def test_a_killed_study_goes_on_with_the_run_that_it_was_in():
    Path("toy.yaml").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent)))}
    command = [sys.executable, "-m", "lightning_dni", "study", "--config", "toy.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert calls() == ["0.5 0", "0.5 1"]
    first, second = "rate=0.5,kind=a,seed=0", "rate=0.5,kind=a,seed=1"
    before = finished()
    assert list(before) == [first]
    Path("runs/toy", second, "rubbish").touch()
    assert study(KILLED) == 0
    assert calls() == ["0.5 0", "0.5 1", "0.5 1", *calls()[3:]]
    assert len(calls()) == 9
    assert finished()[first] == before[first]
    assert not Path("runs/toy", second, "rubbish").exists()
    assert [row["status"] for row in rows()] == ["finished"] * 8


def test_ctrl_c_in_a_function_stops_and_the_same_command_goes_on(capsys):
    assert study(STOPPED) == 130
    assert "Stopped: 2 of 8 runs have finished. The same command goes on." in capsys.readouterr().out
    assert [row["status"] for row in rows()] == ["finished"] * 2 + ["missing"] * 6
    assert study(STOPPED) == 0
    assert len(calls()) == 3 + 6


def test_a_run_that_ends_the_process_has_failed_and_the_others_go_on(capsys):
    assert study(CALL.replace("parts.figures", "parts.ends_the_process")) == 1
    assert "SystemExit: no such data" in capsys.readouterr().out
    assert [row["status"] for row in rows()] == ["failed"] * 4 + ["finished"] * 4


def test_a_configuration_with_nan_is_unchanged():
    with_nan = CALL.replace('seed: "${run.seed}"', 'seed: "${run.seed}", other: .nan')
    assert study(with_nan) == 0
    assert study(with_nan) == 0
    assert len(calls()) == 8


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_a_training_stops_the_study(name):
    interrupting = f"callbacks: [{{class_path: study.parts.Interrupt, init_args: {{signal_name: {name}}}}}]"
    text = MANY.replace("    max_epochs", f"    {interrupting}\n    max_epochs")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert study(text) == 130
    assert finished() == {}
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert study(text) == 0
    assert set(finished()) == {"seed=0", "seed=1"}


def test_a_changed_configuration_is_refused_before_anything_runs(capsys):
    assert study(CALL, "--only.rate", "1.0") == 0
    before = finished()
    assert study(CALL, "--arguments.more", "3") == 2
    said = capsys.readouterr().err
    assert "Expected the finished run 'runs/toy/rate=1.0,kind=a,seed=0' to be configured as it is now" in said
    assert "`arguments.more` was left out and is 3. Pass another `--out`, or delete the folder" in said
    assert finished() == before
    assert len(calls()) == 4
    assert study(CALL, "--arguments.more", "3", "--out", "other") == 0
    assert len(finished("other")) == 8


def test_an_unfinished_run_may_be_configured_anew():
    assert study(FAILING) == 1
    assert (
        study(CALL.replace('seed: "${run.seed}"', 'seed: "${run.seed}", fails_at: 2.0'), "--only.rate", "1.0")
        == 0
    )


def test_results_of_different_versions_are_told_apart(capsys):
    assert study(CALL) == 0
    assert "different versions" not in capsys.readouterr().out
    file = Path("runs/toy/rate=0.5,kind=a,seed=0/result.json")
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    assert study(CALL) == 0
    said = capsys.readouterr().out
    assert "These are results of different versions: " in said
    assert "torch 1.0 " in said
    assert f"torch {torch.__version__} " in said


def test_a_failing_run_does_not_stop_the_others(capsys):
    assert study(FAILING) == 1
    assert len(calls()) == 8
    found = rows()
    assert [row["status"] for row in found] == ["finished"] * 4 + ["failed"] * 4
    assert {row["failure"] for row in found[4:]} == {"RuntimeError: rate 1.0 is too much"}
    said = capsys.readouterr().out
    assert "0 of 2, 2 failed" in said
    assert said.count("  RuntimeError: rate 1.0 is too much") == 1  # once for the four that it stopped
    trace = Path("runs/toy/rate=1.0,kind=a,seed=0/error.txt").read_text()
    assert "Traceback" in trace
    assert "parts.py" in trace
    assert study(FAILING.replace("fails_at: 1.0", "fails_at: null"), "--only.rate", "1.0") == 0
    assert len(calls()) == 12


def test_a_training_is_what_the_command_fit_does_alone():
    assert study(FIT, "--grid.width", "[4, 8]", "--fit.model.init_args.hidden_size", "${run.width}") == 0
    folder = Path("runs/toy/width=8,seed=0")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    cli = run(["fit", "--config", str(folder / "run.yaml"), *quiet])
    assert metrics["train_loss"] == float(cli.trainer.callback_metrics["train_loss"])
    assert metrics["val_loss"] == float(cli.trainer.callback_metrics["val_loss"])
    tested = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    assert metrics["test_accuracy"] == tested["test_accuracy"]
    assert metrics.keys() > {"val_accuracy", "test_error", "seconds"}
    assert [row["width"] for row in rows()] == ["4", "8"]
    with (folder / "csv/metrics.csv").open() as lines:
        assert "train_loss" in next(lines)


def test_seeds_differ_and_repeat():
    text = "seeds: [0, 1]\ngrid: {turn: [1, 2]}\ncall: study.parts.global_random"
    assert study(text) == 0
    drawn = {(row["turn"], row["seed"]): (row["drawn"], row["other"]) for row in rows()}
    assert drawn["1", "0"] == drawn["2", "0"] != drawn["1", "1"]
    torch.manual_seed(1)
    assert float(drawn["2", "1"][0]) == torch.rand(()).item()


def test_what_a_run_leaves_behind():
    assert study(CALL, "--arguments.draws", "true") == 0
    folder = Path("runs/toy/rate=0.5,kind=b,seed=1")
    assert OmegaConf.load(folder / "run.yaml") == {
        "call": "study.parts.figures",
        "arguments": {"rate": 0.5, "seed": 1, "draws": True},
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["final"] == 1.0625
    assert result["versions"]["torch"] == torch.__version__
    assert (folder / "drawn.png").read_bytes()[:4] == b"\x89PNG"
    lines = (folder / "csv/metrics.csv").read_text().split()
    assert lines == ["step,loss", "0,1.5", "1,1.25", "2,1.125", "3,1.0625"]
    assert OmegaConf.load("runs/toy/study.yaml").grid.kind == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--call", "study.parts.none"], "'study.parts.none' cannot be imported"),
        (["--call", "no_such_package.f"], "'no_such_package.f' cannot be imported: No module named"),
        (["--call", "study.parts.CALL"], "Expected `call` to name a function, but study.parts.CALL is"),
        (
            ["--call", "study.parts.nothing", "--arguments", "{}"],
            "to return a mapping of names to figures, but got 3",
        ),
        (["--arguments.odd", "[[1]]"], "Expected the figure 'odd' to be a number, a sequence"),
        (["--arguments.kind", "1"], "names of their own, but got 'kind', which is a column"),
        (
            ["--arguments", "{nothing: 1}"],
            "TypeError: figures() missing 1 required positional argument: 'rate'",
        ),
    ],
)
def test_a_function_that_does_not_fit_is_a_failed_run(words, message, capsys):
    assert study(CALL, *words, "--only", "{rate: 0.5, kind: a}", "--seeds", "0") == 1
    assert message in rows()[0]["failure"]
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit.model.init_args.hiden", "3"], "hiden"),
        (
            ["--fit.trainer.devices", "2"],
            "Expected one process for each run of a study, but `fit.trainer` asks for 2",
        ),
        (["--fit.trainer.strategy", "dni"], "configure_dni"),
    ],
)
def test_a_training_that_cannot_be_built_is_a_failed_run(words, message):
    assert study(FIT, *words) == 1
    assert message in rows()[0]["failure"]


def test_building_runs_nothing():
    cli = build(["--config", str(TESTS.parent / "recipes/digits_backprop.yaml"), "--trainer.logger", "false"])
    assert cli.trainer.global_step == 0
    assert not list(Path().iterdir())


def test_what_had_finished_before_ctrl_c_stays_in_the_table(capsys):
    assert study(CALL) == 0
    shutil.rmtree("runs/toy/rate=0.5,kind=b,seed=0")
    Path("calls.txt").write_text("0.5 0\n0.5 1\n")
    assert study(STOPPED, "--call", "study.parts.figures", "--out", "other") == 0
    for folder in Path("runs/toy").glob("*/run.yaml"):
        folder.write_text(folder.read_text().replace("parts.figures", "parts.interrupted_once"))
    Path("calls.txt").write_text("0.5 0\n0.5 1\n")
    capsys.readouterr()
    assert study(STOPPED) == 130
    assert "Stopped: 7 of 8 runs have finished." in capsys.readouterr().out
    assert [row["status"] for row in rows()] == ["finished"] * 2 + ["missing"] + ["finished"] * 5


def test_a_picture_that_cannot_be_drawn_and_a_run_of_wandb_leave_the_table(capsys):
    text = CALL + "wandb: {offline: true, projct: a}\npicture: {x: rate, y: final, images: run.yaml}\n"
    assert study(CALL) == 0
    assert study(text, "--grid.rate", "[0.5, 2.0]") == 1
    said = capsys.readouterr().out
    assert "Failed: drawing the picture\n  UnidentifiedImageError: " in said
    assert "Failed: the study's run in W&B\n  TypeError: " in said
    assert [row["status"] for row in rows()] == ["finished"] * 4 + ["failed"] * 4


def test_metrics_of_probes_are_means_of_the_last_ten():
    monitor = (
        "{class_path: lightning_dni.GradientMonitor, init_args: {every_n_train_steps: 1, summary: false}}"
    )
    strategy = (
        "{class_path: lightning_dni.DNIStrategy, init_args: {boundaries: ['net.hidden_0'], estimator: %s}}"
    )
    estimator = "{class_path: lightning_dni.estimators.LinearEstimator, init_args: {num_classes: 10}}"
    text = FIT.replace("limit_train_batches: 3", "limit_train_batches: 12")
    assert study(text + f"    callbacks: [{monitor}]\n    strategy: {strategy % estimator}\n") == 0
    with Path("runs/toy/seed=0/csv/metrics.csv").open(newline="") as opened:
        logged = [row["dni_sg_error/net_hidden_0"] for row in csv.DictReader(opened)]
    probes = [float(each) for each in logged if each]
    metrics = json.loads(Path("runs/toy/seed=0/result.json").read_text())["metrics"]
    assert len(probes) == 12
    assert metrics["dni_sg_error/net_hidden_0"] == pytest.approx(sum(probes[-10:]) / 10, rel=1e-12)
