"""The command, as a shell runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_dni.cli import run

SCRIPT = [str(Path(sys.executable).with_name("lightning-dni"))]
MODULE = [sys.executable, "-m", "lightning_dni"]


def test_help_explains():
    done = subprocess.run([*MODULE, "fit", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage: lightning-dni" in done.stdout
    assert "--trainer.strategy" in done.stdout


def test_help_names_the_commands_beside_those_of_lightning(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "with a --help of their own: study, recipes" in capsys.readouterr().out


def test_a_run_ends_with_success():
    recipe = Path(__file__).parents[1] / "recipes/digits_dni.yaml"
    words = ["fit", "--config", str(recipe), "--trainer.max_steps", "2", "--trainer.logger", "false"]
    done = subprocess.run([*SCRIPT, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LightningCLI object" not in done.stdout + done.stderr


def saved(*words):
    """A short run of a recipe that the user has copied to `config.yaml`; the names of YAMLs afterwards."""
    quiet = ["--trainer.logger", "false", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    run(["fit", *words, *quiet, "--trainer.enable_checkpointing", "false"])
    return {file.name for file in Path().glob("*.yaml")}


def test_a_configuration_of_the_users_is_not_overwritten():
    text = (Path(__file__).parents[1] / "recipes/digits_backprop.yaml").read_text()
    Path("config.yaml").write_text(text)
    Path("other.yaml").write_text(text)
    assert saved("--config", "config.yaml") == {"config.yaml", "config_1.yaml", "other.yaml"}
    assert saved("--config", "other.yaml") == {"config.yaml", "config_1.yaml", "other.yaml"}
    assert Path("config.yaml").read_text() == Path("other.yaml").read_text() == text


def test_a_saved_configuration_that_is_read_again_stays_too():
    recipe = Path(__file__).parents[1] / "recipes/digits_backprop.yaml"
    assert saved("--config", str(recipe)) == {"config.yaml"}
    before = Path("config.yaml").read_text()
    assert saved("--config", "config.yaml", "--model.hidden_size", "8") == {"config.yaml", "config_1.yaml"}
    assert Path("config.yaml").read_text() == before
    assert "hidden_size: 8" in Path("config_1.yaml").read_text()
