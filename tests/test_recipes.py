"""Every recipe is read, built and run for a few steps, with the losses it has always had."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
from made_cifar import write_archive
from omegaconf import OmegaConf

from lightning_dni import DNIStrategy
from lightning_dni.cli import build, run
from lightning_dni.study.configuration import ESTIMATOR_AXES, is_study, read_study
from lightning_dni.study.running import run_study

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "recipes").rglob("*.yaml"))
STUDIES = [path for path in ALL if is_study(OmegaConf.load(path))]
RECIPES = [path for path in ALL if path not in STUDIES]
GOLDEN = json.loads((ROOT / "tests/golden/losses.json").read_text())
MNIST = Path(os.environ.get("LIGHTNING_DNI_MNIST", ROOT.parent / "shared/data/mnist"))
PIPELINES = [path for path in RECIPES if path.stem.endswith("_pipeline")]
each_recipe = pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
each_in_one_process = pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path not in PIPELINES], ids=lambda path: path.stem
)


class Losses(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def fit(recipe, *words, callbacks=()):
    data = ["--data.data_dir", str(MNIST)] if recipe.stem.startswith("mnist") else []
    if data and not MNIST.exists():
        pytest.skip(f"no MNIST files in {MNIST}; set LIGHTNING_DNI_MNIST")
    quiet = ["--trainer.logger", "false", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"]
    return run(["fit", "--config", str(recipe), *quiet, *data, *words], callbacks=callbacks)


def test_there_are_seven_recipes_and_these_studies():
    assert [path.stem for path in STUDIES] == [
        "alternation",
        "approximators",
        "boundaries",
        "character_lstm",
        "cifar_cnn",
        "cifar_fcn",
        "copy",
        "critical_points",
        "deep_linear_dynamics",
        "delayed_gradients",
        "depth_sweep",
        "error_table",
        "estimator_rates",
        "implicit_loss",
        "injected_error",
        "linear_dynamics",
        "random_labels",
        "representations",
        "sparse_updates",
        "staleness",
        "two_clocks",
        "zero_depth",
    ]
    assert [path.stem for path in RECIPES] == [
        "digits_backprop",
        "digits_critic",
        "digits_dni",
        "digits_local_loss",
        "digits_pipeline",
        "gpt_pipeline",
        "mnist_fcn",
    ]


@each_in_one_process
def test_each_recipe_has_its_golden_losses(recipe):
    kept = Losses()
    fit(recipe, "--trainer.max_steps", "5", callbacks=[kept])
    assert len(kept.losses) == 5
    assert kept.losses == pytest.approx(GOLDEN[recipe.stem], rel=1e-4)


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.stem)
def test_each_pipeline_has_its_golden_losses(recipe, tmp_path):
    """By the command, which starts the other processes; the losses are those in its CSV file."""
    if recipe.stem == "gpt_pipeline" and sys.version_info[:2] != (3, 11):
        pytest.skip("the text is that of Python 3.11")
    words = [
        "--trainer.max_steps",
        "5",
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.limit_val_batches",
        "0",
    ]
    words += ["--trainer.callbacks", "null", "--trainer.num_sanity_val_steps", "0"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_dni", "fit", "--config", str(recipe), *words]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300, capture_output=True)
    (file,) = tmp_path.glob(f"runs/{recipe.stem}/csv/last/metrics.csv")
    with file.open() as rows:
        losses = [float(row["train_loss"]) for row in csv.DictReader(rows) if row.get("train_loss")]
    assert losses == pytest.approx(GOLDEN[recipe.stem], rel=1e-4)


def covering(study):
    """A run for every value on every axis, with the first seed."""
    seen = set()
    for each in study.runs:
        new = set(each.cell.items()) - seen
        if new or not seen:
            seen |= new or {("seed", each.seed)}
            yield each


@pytest.mark.parametrize("recipe", STUDIES, ids=lambda path: path.stem)
def test_each_study_runs_in_short(recipe, tmp_path):
    """With the values under `quick`: every value on every axis, all metrics, and the picture."""
    overrides = [("wandb", "null")]
    for key in ("fit.data.init_args.data_dir", "arguments.data_dir"):
        if OmegaConf.select(OmegaConf.load(recipe), key) == "data/mnist":
            if not MNIST.exists():
                pytest.skip(f"no MNIST files in {MNIST}; set LIGHTNING_DNI_MNIST")
            overrides.append((key, str(MNIST)))
    if "CIFAR10DataModule" in recipe.read_text():
        made = write_archive(tmp_path / "made").parent
        overrides += [("fit.data.init_args.data_dir", str(made)), ("fit.data.init_args.val_size", "2")]
    assert OmegaConf.load(recipe).get("quick"), "say under `quick` how this study runs in seconds"
    study = read_study(recipe, overrides, quick=True)
    study = replace(study, runs=list(covering(study)))
    outcome = run_study(study, tmp_path / "out", build)
    assert outcome.failed == {}
    assert len(outcome.results) == len(study.runs) > 0
    assert study.picture is not None
    logged = {name for result in outcome.results.values() for name in result.metrics}
    assert {*study.table} <= logged
    by_layer = {name.partition("/")[0] for name in logged}
    assert {*study.picture.y} <= (by_layer if study.picture.x == "layer" else logged)
    assert (tmp_path / "out/picture.png").exists()


@pytest.mark.parametrize("recipe", STUDIES, ids=lambda path: path.stem)
def test_the_job_types_of_a_study_are_its_estimators(recipe):
    """An axis called so, or what the recipe says; never what happens to be the first axis, and no number."""
    study = read_study(recipe)
    assert "job_type" in study.recipe or {*ESTIMATOR_AXES} & {*study.axes}
    job_types = {study.job_type(run) for run in study.runs}
    assert not [each for each in job_types if re.fullmatch(r"[-+\d.e]+", each)]


def test_deep_linear_nets_see_the_data_of_shallow_ones():
    deep, shallow = (read_study(ROOT / f"recipes/{name}linear_dynamics.yaml").axes for name in ("deep_", ""))
    assert deep == shallow
    assert deep["features"] == ["2", "100"]


def test_every_depth_is_swept_with_every_method_and_seed():
    study = read_study(ROOT / "recipes/depth_sweep.yaml")
    assert study.axes["depth"] == ["3", "5", "10", "20", "50"]
    assert study.axes["method"] == ["backprop", "one SG", "one SG after a warmup"]
    assert len(study.runs) == 5 * 3 * 2 * 3  # no point is left out


def test_probes_have_a_net_beside_them_whose_weights_have_not_moved():
    study = read_study(ROOT / "recipes/representations.yaml", [("only.mode", "untrained")])
    rates = {run.configuration["model"]["init_args"]["learning_rate"] for run in study.runs}
    steps = {run.configuration["trainer"]["max_steps"] for run in study.runs}
    assert max(rates) * max(steps) < 1e-8  # Adam moves a weight by the rate at most


def test_the_approximators_are_those_of_the_papers_table_and_kickback_has_an_error_that_is_not_zero():
    methods = OmegaConf.load(ROOT / "recipes/approximators.yaml").grid.method
    assert methods["backprop"].strategy == "auto"
    rows = {name: each.estimator for name, each in methods.items() if "estimator" in each}
    classes = {each.class_path.rpartition(".")[2] for each in rows.values()}
    table = {"Linear", "FeedbackAlignment", "DirectFeedbackAlignment", "Kickback", "Probe"}
    assert {f"{name}Estimator" for name in table} <= classes
    assert [rows[f"SG + prop ({alpha})"].init_args.prop_alpha for alpha in (0.1, 1)] == [0.1, 1]
    squares = {name for name, each in methods.items() if each.loss == "squared_error"}
    assert squares == {name for name in methods if name.endswith("(squares)")}
    assert "init_args" not in rows["Kickback (squares)"]  # the derivative with respect to the output


@each_recipe
def test_each_recipe_says_what_it_shows_and_how_it_is_run(recipe):
    header, _, _ = recipe.read_text().partition("recipe:\n")
    command = "study" if recipe in STUDIES else "fit"
    assert f"lightning-dni {command} --config recipes/{recipe.name}" in header
    if recipe in STUDIES:
        assert "Expected: " in header
        assert "Measured on 20" in header
        assert (ROOT / f"docs/{recipe.stem}.png").exists()
    said = OmegaConf.load(recipe).recipe
    assert said.claim
    assert said.minutes > 0


def test_the_readme_holds_the_tables_as_they_are_made_from_the_yamls():
    command = [sys.executable, str(ROOT / "recipes/report.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    tables = re.findall(r"^(?:\|.*\n)+", made.stdout, re.MULTILINE)
    assert re.findall(r"^(?:\|.*\n)+", (ROOT / "recipes/README.md").read_text(), re.MULTILINE) == tables
    rows = [line for table in tables for line in table.splitlines()[2:]]
    assert len(rows) == len(ALL)
    for line in rows:
        recipe, claim, command, expected, measured, minutes, picture = line.strip("| ").split(" | ")
        name = recipe.strip("`")
        said = OmegaConf.load(ROOT / f"recipes/{name}.yaml").recipe
        assert claim.startswith(said.claim)
        assert all(tag in claim for tag in said.get("tags", []))
        assert f"--config recipes/{name}.yaml" in command
        assert re.match(r"\d{4}-\d\d-\d\d \(torch \d.*lightning \d", measured), measured
        assert "Measured on" not in expected
        assert minutes == str(said.minutes)
        assert (picture != "-") == (ROOT / f"docs/{name}.png").exists()


def test_an_override_reaches_what_refers_to_it():
    recipe = ROOT / "recipes/digits_dni.yaml"
    cli = fit(recipe, "--trainer.max_steps", "1", "--model.learning_rate", "0.25")
    strategy = cli.trainer.strategy
    assert isinstance(strategy, DNIStrategy)
    assert cli.model.hparams.learning_rate == 0.25
    assert strategy.engine.describe()["estimator_optimizers"] == [{"name": "Adam", "lr": 0.25}]


@pytest.mark.parametrize(
    ("word", "named"), [("--model.hiden_size", "hiden_size"), ("--trainer.strategy.boundries", "boundries")]
)
def test_a_wrong_key_names_itself(word, named, capsys):
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(ROOT / "recipes/digits_dni.yaml"), word, "3"])
    assert f"Option '{named}' is not accepted" in capsys.readouterr().err


def test_the_numbers_are_those_of_the_pinned_torch(pytestconfig):
    pins = (pytestconfig.rootpath / "constraints.txt").read_text().splitlines()
    assert f"torch=={GOLDEN['torch']}" in pins, "measure the golden losses anew"
