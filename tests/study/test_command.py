"""`lightning-dni study`: its words and exit codes."""

from pathlib import Path

import pytest
from study.parts import CALL, calls, study

from lightning_dni.cli import build
from lightning_dni.study.command import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "Expected `--config` to name a study's YAML, but got none"),
        (["toy.yaml"], "Expected `--KEY VALUE`, but got 'toy.yaml'. See `lightning-dni study --help`"),
        (["--config", "toy.yaml", "--quick=false"], "Expected `--quick` without a value, but got"),
        (["--config"], "Expected a value after '--config', but got none"),
        (["--config", "none.yaml"], "Expected `--config` to name a YAML file, but there is no 'none.yaml'"),
        (
            ["--config", "toy.yaml", "--only.rate", "2"],
            "Expected `only.rate` to be among 0.5, 1.0, but got '2'",
        ),
        (["--config", "toy.yaml", "--sseds", "2"], "but got 'sseds'. Write 'seeds'"),
        (["--config", "toy.yaml", "--skip", "[{rate: [0.5, 1.0]}]"], "`skip` and `only` leave none"),
    ],
)
def test_wrong_words_are_named(words, message, capsys):
    Path("toy.yaml").write_text(CALL)
    assert main(words, build) == 2
    assert message in capsys.readouterr().err
    assert calls() == []


def test_help_explains(capsys):
    assert main(["--help"], build) == 0
    assert "--seeds 0,1,2" in capsys.readouterr().out
    assert main([], build) == 2


def test_a_quick_look_goes_elsewhere():
    text = CALL + "quick: {grid.rate: [0.1], seeds: [7]}\n"
    assert study(text, "--quick", "--arguments.more=3") == 0
    assert calls() == ["0.1 7", "0.1 7"]
    assert Path("runs/toy_quick/results.csv").exists()
    assert not Path("runs/toy").exists()
