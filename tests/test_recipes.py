"""Every recipe is read, built and run for a few steps, with the losses it has always had."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_dni import DNIStrategy
from lightning_dni.cli import run

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
GOLDEN = json.loads((ROOT / "tests/golden/losses.json").read_text())
MNIST = Path(os.environ.get("LIGHTNING_DNI_MNIST", ROOT.parent / "shared/data/mnist"))
PIPELINES = [path for path in RECIPES if path.stem.endswith("_pipeline")]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
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


def test_there_are_seven_recipes():
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


@each_recipe
def test_each_recipe_says_how_it_is_run(recipe):
    header = recipe.read_text().split("seed_everything")[0]
    assert f"lightning-dni fit --config recipes/{recipe.name}" in header
    assert f"`{recipe.stem}`" in (ROOT / "recipes/README.md").read_text()


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
