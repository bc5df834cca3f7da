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
