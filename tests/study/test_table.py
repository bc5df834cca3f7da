"""The table: CSV files per cell and per run, and what is printed."""

import math
from pathlib import Path

import pytest
from study.parts import CALL, rows, study

from lightning_dni.study.table import mean_and_spread

RESULTS = "runs/toy/results.csv"


def test_a_row_per_cell_with_mean_and_spread_over_seeds():
    assert study(CALL, "--seeds", "0,1,4") == 0
    found = rows(RESULTS)
    assert [(row["rate"], row["kind"]) for row in found] == [
        ("0.5", "a"),
        ("0.5", "b"),
        ("1.0", "a"),
        ("1.0", "b"),
    ]
    assert list(found[0])[:5] == ["rate", "kind", "seeds", "failed", "final"]
    row = found[0]
    values = [0.5**4 + seed for seed in (0, 1, 4)]
    mean = sum(values) / 3
    assert float(row["final"]) == pytest.approx(mean)
    assert float(row["final_std"]) == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    assert (row["seeds"], row["failed"], row["failure"]) == ("3", "0", "")


def test_a_row_per_run():
    assert study(CALL) == 0
    found = rows("runs/toy/runs.csv")
    assert [float(row["final"]) for row in found] == [0.0625, 1.0625, 0.0625, 1.0625, 1, 2, 1, 2]
    assert [row["seed"] for row in found] == ["0", "1"] * 4
    assert {row["loss"] for row in found} == {row["final"] for row in found}  # a curve's last value


def test_the_printed_table_is_whole_and_shows_what_was_asked_for(capsys):
    text = CALL.replace(
        "table: [final]", "table: [final, quite_a_long_name_of_a_metric, another_long_name_here]"
    )
    text = text.replace('seed: "${run.seed}"', 'seed: "${run.seed}", quite_a_long_name_of_a_metric: 7')
    assert study(text, "--only.rate", "0.5") == 1
    said = capsys.readouterr().out
    assert "toy: Half is less than one" in said
    assert [line.split() for line in said.splitlines() if line.startswith("│ 0.5")] == [
        ["│", "0.5", "│", kind, "│", "0.5625", "±", "0.71", "│", "7", "±", "0", "│", "-", "│", "2", "│"]
        for kind in "ab"
    ]
    assert "but no run has logged 'another_long_name_here'. Logged were: final, loss, quite_a_long" in said
    assert f"Results: {RESULTS}" in said


def test_one_seed_has_no_spread_and_failures_are_counted(capsys):
    text = CALL.replace('rate: "${run.rate}"', 'rate: "${run.rate}", fails_at: 1.0')
    assert study(text, "--seeds", "0", "--only.kind", "a") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "0.5", "│", "a", "│", "0.0625", "│", "1", "│"] in lines
    assert ["│", "1.0", "│", "a", "│", "-", "│", "0", "of", "1,", "1", "failed", "│"] in lines
    found = rows(RESULTS)
    assert (found[0]["final_std"], found[1]["final"]) == ("nan", "")
    assert (found[1]["seeds"], found[1]["failed"]) == ("0", "1")
    assert found[1]["failure"] == "RuntimeError: rate 1.0 is too much"
    assert not Path("runs/toy/picture.png").exists()


@pytest.mark.parametrize("values", [[math.inf, -math.inf], [1.7e308, 1.7e308]])
def test_values_without_a_mean_do_not_end_the_study(values):
    assert all(map(math.isnan, mean_and_spread(values)))


def test_a_metric_that_is_called_as_a_spread_does_not_stand_in_its_place():
    assert study(CALL, "--arguments.final_std", "100", "--only", "{rate: 1.0, kind: a}") == 0
    (row,) = rows(RESULTS)
    assert float(row["final_std"]) == 100
    assert float(row["final_std_over_seeds"]) == pytest.approx(0.5**0.5)
