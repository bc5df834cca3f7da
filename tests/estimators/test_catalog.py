"""The table of estimators is read off the classes, printed by the command, and the one in the guide."""

import sys
from pathlib import Path

import pytest

from lightning_dni import cli, estimators
from lightning_dni.core import GradientEstimator
from lightning_dni.estimators import catalog

GUIDE = Path(__file__).parents[2] / "docs/estimators.md"


def rows():
    return {row[0]: dict(zip(catalog.HEADINGS, row, strict=True)) for row in catalog.catalog()}


def test_the_guide_holds_the_table_as_it_is_made():
    assert catalog.markdown() in GUIDE.read_text()


def test_every_estimator_is_in_it_once_with_its_option():
    names = [row[0] for row in catalog.catalog()]
    with_option = [f"{kind}Estimator, prop_alpha=a" for kind in ("Conv", "Linear", "MLP")]
    assert sorted(names) == sorted([*estimators.__all__, *with_option])


@pytest.mark.parametrize(
    ("name", "learns", "locks", "direct"),
    [
        ("LinearEstimator", "yes", "forward", "no"),
        ("LinearEstimator, prop_alpha=a", "yes", "forward, update, backward", "no"),
        ("BackpropEstimator", "no", "forward, update, backward", "no"),
        ("DelayedGradientEstimator", "no", "forward", "no"),
        ("FeedbackAlignmentEstimator", "no", "forward, update, backward", "no"),
        ("DirectFeedbackAlignmentEstimator", "no", "forward, update", "yes"),
        ("KickbackEstimator", "no", "forward, update", "yes"),
        ("ProbeEstimator", "yes", "forward", "yes (label)"),
        ("LocalLossEstimator", "yes", "forward", "yes (label)"),
        ("CriticEstimator", "yes", "forward", "yes (output, label)"),
        ("ZeroEstimator", "no", "forward", "no"),
    ],
)
def test_it_says_what_is_learnt_what_is_waited_for_and_who_sees_the_error(name, learns, locks, direct):
    row = rows()[name]
    assert (row["s learns"], row["locks"], row["direct error"]) == (learns, locks, direct)


def test_it_follows_the_classes(monkeypatch):
    monkeypatch.setattr(estimators.ZeroEstimator, "locks", estimators.KickbackEstimator.locks)
    monkeypatch.setattr(estimators.ZeroEstimator, "loss", estimators.ProbeEstimator.loss)
    row = rows()["ZeroEstimator"]
    assert (row["locks"], row["s learns"]) == ("forward, update", "yes")
    assert catalog.markdown() not in GUIDE.read_text()


def test_an_estimator_without_facts_is_noticed(monkeypatch):
    monkeypatch.setattr(estimators, "__all__", [*estimators.__all__, "New"])
    monkeypatch.setattr(estimators, "New", type("New", (GradientEstimator,), {}), raising=False)
    with pytest.raises(AssertionError, match="New has no `facts`"):
        catalog.catalog()


@pytest.mark.parametrize("columns", [80, 200])
def test_the_command_prints_it_and_cuts_no_word(columns, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-dni", "estimators"])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    cells = [cell.replace("Estimator", "") for row in catalog.catalog() for cell in row]
    words = {word for cell in (*cells, *catalog.HEADINGS[1:]) for word in cell.split()}
    assert not {word for word in words if word not in printed}


def test_the_command_takes_no_words(capsys):
    assert catalog.main(["--help"]) == 0
    assert catalog.main(["Linear"]) == 2
    assert capsys.readouterr().out.count("usage: lightning-dni estimators") == 2
