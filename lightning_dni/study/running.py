"""The loop over the runs of a study: what has finished is kept, what fails is noted, the others go on."""

import gc
import platform
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from tqdm import tqdm

from lightning_dni.callbacks.pictures import write_figure
from lightning_dni.callbacks.wandb_report import close_run, log_files, log_picture
from lightning_dni.study.configuration import Run, Study
from lightning_dni.study.execution import Build, call, train
from lightning_dni.study.folder import Result, RunFolder
from lightning_dni.study.picture import draw_study
from lightning_dni.study.table import check_metrics, write_results, write_runs

CONFIGURATION, RUNS, RESULTS, PICTURE = "study.yaml", "runs.csv", "results.csv", "picture.png"


@dataclass
class Outcome:
    """What came of a study: results by run, whether Ctrl-C stopped it, what failed beside its runs."""

    results: dict[str, Result] = field(default_factory=dict)
    interrupted: bool = False
    ran: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """The error of each failed run."""
        return {name: each.error for name, each in self.results.items() if each.error is not None}


def run_study(study: Study, out: Path, build: Build) -> Outcome:
    """Run what has not finished yet, and write table and picture.

    Args:
        study: As read.
        out: Its folder, with a folder for each run.
        build: Makes model, data and trainer from words.

    Raises:
        StudyError: A finished run was configured otherwise.
    """
    outcome = Outcome()
    folders = {run.name: RunFolder(out / run.name) for run in study.runs}
    for run in study.runs:
        if folders[run.name].finished:
            folders[run.name].check_unchanged(run.configuration)
    out.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(study.source, out / CONFIGURATION)
    with tqdm(study.runs, desc=study.name, unit="run", dynamic_ncols=True) as bar:
        for run in bar:
            folder = folders[run.name]
            if not folder.finished:
                bar.set_postfix_str(run.name)
                try:
                    _run(study, run, folder, build)
                except (KeyboardInterrupt, SystemExit):
                    outcome.interrupted = True
                    break
                outcome.ran += 1
                gc.collect()  # trainer and data refer to each other, and are few objects, if large ones
            result = folder.result
            assert result is not None
            outcome.results[run.name] = result
            if result.error is not None:
                bar.write(f"{run.name} failed: {result.error}")
    if outcome.interrupted:
        left = {name: folder for name, folder in folders.items() if name not in outcome.results}
        outcome.results |= {name: each.result for name, each in left.items() if each.finished and each.result}
    _write(study, outcome, out)
    return outcome


def _run(study: Study, run: Run, folder: RunFolder, build: Build) -> None:
    """One run; whatever it raises but Ctrl-C becomes its result."""
    folder.start(run.configuration)
    wandb = _wandb(study, run.name, study.job_type(run))
    error: str | None = None
    metrics: dict[str, float] = {}
    trace = None
    closed_well = False
    try:
        with _quiet():
            if "call" in run.configuration:
                metrics = call(run.configuration, folder.path, run.seed, wandb)
            else:
                metrics = train(run.configuration, folder.path, wandb, build)
            check_metrics(metrics, study)
            if wandb is not None:
                log_files(_logger(wandb, folder.path), run.name, "configuration", [folder.configuration_file])
        closed_well = True
    except (Exception, SystemExit) as raised:
        if _stops(raised):
            raise
        error, trace = f"{type(raised).__name__}: {raised}", traceback.format_exc()
    finally:
        if wandb is not None:
            close_run(failed=not closed_well)
    folder.end(Result(metrics, error, _versions()), trace)


def _stops(raised: BaseException) -> bool:
    """Whether a signal is behind it: a Trainer ends by SystemExit on either, as a script may by itself."""
    interrupted = isinstance(raised.__context__, KeyboardInterrupt)
    return isinstance(raised, SystemExit) and (interrupted or isinstance(raised, SIGTERMException))


def _wandb(study: Study, name: str, job_type: str) -> dict[str, Any] | None:
    """Arguments of a run's WandbLogger; what the YAML says goes first."""
    if study.wandb is None:
        return None
    return {"name": name, "group": study.name, "job_type": job_type, "tags": study.tags, **study.wandb}


def _logger(wandb: Mapping[str, Any], folder: Path) -> WandbLogger:
    """A logger of the open run, or of a new one."""
    return WandbLogger(**{"save_dir": str(folder.absolute()), **wandb})


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's greetings, which would come once per run."""
    loggers = [getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(WARNING)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@contextmanager
def _noting(outcome: Outcome, what: str) -> Iterator[None]:
    """Have an error told below the table, which is more than what failed."""
    try:
        yield
    except Exception as error:
        outcome.problems.append(f"Failed: {what}\n  {type(error).__name__}: {error}")


def _write(study: Study, outcome: Outcome, out: Path) -> None:
    write_runs(study, outcome.results, out / RUNS)
    write_results(study, outcome.results, out / RESULTS)
    if study.picture is not None and len(outcome.failed) < len(outcome.results):
        (out / PICTURE).unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
        with _noting(outcome, "drawing the picture"):
            write_figure(draw_study(study, outcome.results, out), out / PICTURE)
    wandb = _wandb(study, study.name, "study")
    if wandb is None or not outcome.ran or outcome.interrupted:
        return
    with _quiet(), _noting(outcome, "the study's run in W&B"):
        logger = _logger(wandb, out)
        log_files(logger, study.name, "study", [out / name for name in (CONFIGURATION, RESULTS, RUNS)])
        if (out / PICTURE).exists():
            log_picture(logger, "picture", out / PICTURE)
        close_run()
