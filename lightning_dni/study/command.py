"""`lightning-dni study`: its words, what it prints, and its exit code."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement

from lightning_dni.errors import StudyError
from lightning_dni.study.configuration import Study, read_study
from lightning_dni.study.execution import Build
from lightning_dni.study.names import layers_of
from lightning_dni.study.running import PICTURE, RESULTS, Outcome, run_study
from lightning_dni.study.table import printed_table

USAGE = """usage: lightning-dni study --config FILE [--out FOLDER] [--seeds 0,1,2] [--quick] [--KEY VALUE ...]

Runs what a study's YAML compares, one run after the other, then prints a table and draws a picture. Runs that
have finished are not repeated; one that was interrupted or has failed is started again.

  --config FILE    the study's YAML
  --out FOLDER     where results go; runs/NAME unless it is given
  --seeds 0,1,2    in place of the YAML's
  --quick          with the values under `quick`, in runs/NAME_quick: a look at whether everything runs
  --KEY VALUE      any key of the YAML, dotted: --fit.trainer.max_epochs 1, --only.method cDNI, --wandb null
"""
INTERRUPTED = 130

EXPECTED = (
    "LightningCLI's args parameter is intended",
    "There is a wandb run already in progress",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Warnings of Lightning's that mean nothing here and would come with every run."""


def main(words: Sequence[str], build: Build) -> int:
    """Run `lightning-dni study` with `words`.

    Args:
        words: What follows `study` on the command line.
        build: Makes model, data and trainer from words of LightningCLI.

    Returns:
        The exit code: 0, 1 where a run has failed, 2 where words or YAML are wrong, 130 after Ctrl-C.
    """
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(USAGE)
        return 0 if words else 2
    os.environ.setdefault("WANDB_SILENT", "true")
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    try:
        study, out = _read(words)
        outcome = run_study(study, out, build)
    except StudyError as error:
        sys.stderr.write(f"lightning-dni study: {error}\n")
        return 2
    problems = _show(study, outcome, out)
    return INTERRUPTED if outcome.interrupted else 1 if problems else 0


def _read(words: Sequence[str]) -> tuple[Study, Path]:
    options = dict(_pairs(words))
    quick = options.pop("quick", None) is not None
    config, out = options.pop("config", None), options.pop("out", None)
    if config is None:
        raise StudyError("Expected `--config` to name a study's YAML, but got none. Pass `--config FILE`.")
    study = read_study(config, list(options.items()), quick=quick)
    if not study.runs:
        raise StudyError(
            "Expected a study of at least one run, but `skip` and `only` leave none. Change them."
        )
    return study, Path(out or f"runs/{study.name}{'_quick' if quick else ''}")


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--key value` and `--key=value`."""
    pairs, left = [], list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise StudyError(f"Expected `--KEY VALUE`, but got {word!r}. See `lightning-dni study --help`.")
        if equals and key == "quick":
            raise StudyError(
                f"Expected `--quick` without a value, but got {word!r}. Leave it out for a whole run."
            )
        if not equals and key != "quick":
            if not left:
                raise StudyError(f"Expected a value after {word!r}, but got none. Pass one.")
            value = left.pop(0)
        pairs.append((key, value))
    return pairs


def _show(study: Study, outcome: Outcome, out: Path) -> list[str]:
    """Print the table and what went wrong; the latter comes back."""
    table = printed_table(study, outcome.results)
    console = Console()
    whole = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, whole)).print(table)
    plain = Console(soft_wrap=True, highlight=False, markup=False)
    plain.print(f"Results: {out / RESULTS}")
    if (out / PICTURE).exists():
        plain.print(f"Picture: {out / PICTURE}")
    found = {" ".join(f"{k} {v}" for k, v in each.versions.items()) for each in outcome.results.values()}
    if len(found) > 1:
        plain.print(f"These are results of different versions: {'; '.join(sorted(found))}.")
    problems = _problems(study, outcome)
    for problem in problems:
        plain.print(problem)
    if outcome.interrupted:
        done = len(outcome.results) - len(outcome.failed)
        plain.print(f"Stopped: {done} of {len(study.runs)} runs have finished. The same command goes on.")
    return problems


def _problems(study: Study, outcome: Outcome) -> list[str]:
    """Failed runs by error, and metrics that no run has logged."""
    by_error: dict[str, list[str]] = {}
    for name, error in outcome.failed.items():
        by_error.setdefault(error, []).append(name)
    problems = [f"Failed: {'; '.join(names)}\n  {error}" for error, names in by_error.items()]
    problems += outcome.problems
    finished = [each for each in outcome.results.values() if each.error is None]
    logged = sorted({name for each in finished for name in each.metrics})
    drawn = study.picture.y if study.picture else ()
    if study.over_layers:
        drawn = tuple(name for name in drawn if not layers_of(name, logged))
    asked = dict.fromkeys((*study.table, *drawn))
    if finished and not outcome.interrupted:
        problems += [
            f"Expected `table` and `picture.y` to name metrics, but no run has logged {name!r}. Logged were: "
            f"{', '.join(logged)}."
            for name in asked
            if name not in logged
        ]
    return problems
