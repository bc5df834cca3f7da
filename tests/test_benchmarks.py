"""The tables of the comparison of estimators are made from what was measured."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FOLDER = BENCHMARKS / "estimators"


def lines_of_tables(text):
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("benchmark", "tables"), [("estimators", 12), ("step_time", 2)])
def test_the_tables_of_the_readme_are_what_the_report_prints(benchmark, tables):
    folder = BENCHMARKS / benchmark
    command = [sys.executable, str(folder / "report.py")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    said = lines_of_tables((folder / "README.md").read_text())
    assert said == lines_of_tables(made)
    assert sum(line.startswith("|---|") for line in said) == tables


def test_the_pipelines_table_is_what_was_measured():
    folder = BENCHMARKS / "pipeline"
    said = lines_of_tables((folder / "README.md").read_text())
    cells = {}
    with (folder / "results.csv").open() as file:
        for row in csv.DictReader(file):
            share, bound = 0.15 / float(row["seconds per step"]), float(row["bound"])
            cells.setdefault(row["contender"], []).append(f"{100 * share:.1f} ({100 * bound:.0f})")
    assert len(cells) >= 12
    assert [
        line for name, row in cells.items() if (line := f"| {' | '.join([name, *row])} |") not in said
    ] == []


SIMULATED = """
from simulate import SCHEDULES
for name, share in SCHEDULES.items():
    found = [share(s, j, l) for j, l in ((0, 0), (0.2, 0), (0, 0.05)) for s in (8, 64)]
    print("|", " | ".join([name, *(f"{100 * each:.1f}" for each in found)]), "|")
"""


def test_the_pipelines_table_for_more_stages_is_what_the_simulation_prints():
    folder = BENCHMARKS / "pipeline"
    command = [sys.executable, "-c", SIMULATED]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    made = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, cwd=folder, env=environment
    ).stdout.splitlines()
    said = (folder / "README.md").read_text().split("## On paper")[1]
    lines = [line for line in lines_of_tables(said) if line.startswith(("| DNI", "| 1F1B", "| GPipe"))]
    assert len(lines) >= 5
    assert set(lines) <= set(made)


MISSING = """
import everything
from report import Scope
from rows import NETS, rows_of
for task in everything.TASKS:
    scope = Scope(task.net, task.depth, task.rates_of, task.steps)
    for row in ("backprop", *task.rows) if task.rows else rows_of(NETS[task.net]):
        if len(scope.trainings(row)) < task.seeds:
            print(task, row, len(scope.trainings(row)))
"""


def test_what_was_measured_is_what_one_command_measures():
    command = [sys.executable, "-c", MISSING]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=FOLDER)
    assert found.stdout == ""


def test_differences_in_the_guide_are_those_of_the_tables():
    tables = " ".join(lines_of_tables((FOLDER / "README.md").read_text()))
    guide = " ".join((BENCHMARKS.parent / "docs/choosing.md").read_text().split())
    quoted = re.findall(r"[+-]\d+\.\d\d \[[^\]]+\]", guide)
    assert len(quoted) >= 4
    assert [difference for difference in quoted if difference not in tables] == []


def test_tables_of_the_front_page_are_those_of_the_benchmarks():
    front = lines_of_tables((BENCHMARKS.parent / "README.md").read_text())
    compared = [line for line in front if "±" in line]
    tables = lines_of_tables((FOLDER / "README.md").read_text())
    assert len(compared) >= 6
    for line in compared:
        name, _, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        there = [each for each in tables if each.startswith(f"| {name} |")]
        assert [each for each in there if " | ".join(figures).strip(" |") in each], line
    timed = [line for line in front if " / " in line.split("|")[1]]
    tables = lines_of_tables((BENCHMARKS / "step_time/README.md").read_text())
    assert len(timed) >= 4
    assert [line for line in timed if not any(each.startswith(line) for each in tables)] == []
