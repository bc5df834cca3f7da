"""The command, as a shell runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [[str(Path(sys.executable).with_name("lightning-dni"))], [sys.executable, "-m", "lightning_dni"]]


@pytest.mark.parametrize("command", COMMANDS, ids=["script", "module"])
def test_help_explains(command):
    done = subprocess.run([*command, "fit", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage: lightning-dni" in done.stdout
    assert "--trainer.strategy" in done.stdout


def test_a_run_ends_with_success():
    recipe = Path(__file__).parents[1] / "recipes/digits_dni.yaml"
    words = ["fit", "--config", str(recipe), "--trainer.max_steps", "2", "--trainer.logger", "false"]
    done = subprocess.run([*COMMANDS[0], *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "LightningCLI object" not in done.stdout + done.stderr
