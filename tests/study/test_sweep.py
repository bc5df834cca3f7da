"""The sweep of the guide, by the command line that an agent of W&B makes of it; W&B itself is offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from callbacks.runs import read_run
from study.parts import FIT, study
from wandb.sdk.launch.sweeps import utils

ROOT = Path(__file__).parents[2]
(SWEEP,) = re.findall(r"```yaml\n(project: .*?)```", (ROOT / "docs/studies.md").read_text(), re.DOTALL)
SHORT = {"trainer.limit_train_batches": 2, "trainer.max_epochs": 1, "trainer.limit_val_batches": 1}


def command_of(sweep, values):
    """What the agent runs for these values of the parameters: its own functions, and its loop."""
    made = utils.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
    words = []
    for word in utils.create_sweep_command(list(sweep["command"])):
        words += made[word[2:-1]] if word.startswith("${") else [word]
    return words


def run_as_agent(words, values):
    """Run it with the environment that the agent gives; W&B is offline by environment."""
    assert words[0] == "lightning-dni"
    Path("config.yaml").write_text(yaml.safe_dump({name: {"value": v} for name, v in values.items()}))
    given = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_SWEEP_PARAM_PATH": "config.yaml"}
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_dni", *words[1:]]
    ran = subprocess.run(
        command, env=os.environ | given | quiet, timeout=300, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (file,) = Path().rglob("*-r1.wandb")
    return read_run(file)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")


def test_an_agent_of_the_sweep_in_the_guide_runs_one_training(recipes):
    sweep = yaml.safe_load(SWEEP)
    values = {name: each["values"][0] for name, each in sweep["parameters"].items()} | SHORT
    words = command_of(sweep, values)
    assert "--model.learning_rate=0.0003" in words
    run = run_as_agent(words, values)
    assert (run.id, run.sweep_id) == ("r1", "s1")
    assert run.config["model.learning_rate"] == 3e-4  # of the sweep
    assert run.config["learning_rate"] == 3e-4  # of the model
    assert run.config["dni"]["estimator_optimizer"] == {"name": "Adam", "lr": 3e-4}  # which refers to it
    assert sweep["metric"]["name"] in {name for row in run.rows for name in row}


def test_an_agent_runs_one_training_of_a_study(recipes):
    assert study(FIT) == 0
    values = {"model.learning_rate": 0.5} | SHORT
    command = ["lightning-dni", "fit", "--config", "runs/toy/seed=0/run.yaml", "--trainer.logger=WandbLogger"]
    run = run_as_agent(command_of({"command": [*command, "${args}"]}, values), values)
    assert run.config["learning_rate"] == 0.5
