"""One run of a study: a training through LightningCLI, or a call of a function."""

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dni.callbacks.wandb_report import close_run, log_picture
from lightning_dni.errors import StudyError
from lightning_dni.study.figures import keep_figures, read_history

Build = Callable[[list[str]], LightningCLI]
"""LightningCLI with these words: model, data and trainer are built, nothing is run."""

LAST_PROBES, PROBED = 10, "dni_"


def train(
    configuration: Mapping[str, Any], folder: Path, wandb: Mapping[str, Any] | None, build: Build
) -> dict[str, float]:
    """Fit and test; the metrics are what was logged last, of `dni_*` the mean of the last ten.

    Args:
        configuration: That of LightningCLI, resolved.
        folder: Of the run.
        wandb: Arguments of its WandbLogger, or None for no W&B.
        build: Makes model, data and trainer.

    Raises:
        StudyError: The run asks for several processes.
    """
    cli = build(_words(configuration, folder))
    trainer = cli.trainer
    if trainer.world_size > 1:
        raise StudyError(
            f"Expected one process for each run of a study, but `fit.trainer` asks for {trainer.world_size}. "
            "Pass `devices: 1`; recipes of several processes run by `lightning-dni fit`."
        )
    trainer.loggers = _loggers(folder, wandb)
    started = time.perf_counter()
    trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - started
    metrics = _floats(trainer.callback_metrics)
    if is_overridden("test_step", cli.model):
        trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        metrics |= _floats(trainer.callback_metrics)
    logged = _last_logged(folder)
    probes = {name: value for name, value in logged.items() if name.startswith(PROBED)}
    return {**logged, **metrics, **probes, "seconds": seconds}


def call(
    configuration: Mapping[str, Any], folder: Path, seed: int, wandb: Mapping[str, Any] | None
) -> dict[str, float]:
    """Call a function; the metrics are the numbers that it returns.

    Args:
        configuration: `call`, its dotted path, and `arguments`.
        folder: Of the run; curves and pictures that it returns go there, too.
        seed: The global generators get it first.
        wandb: Arguments of a WandbLogger, or None for no W&B.

    Raises:
        StudyError: There is no such function, or it does not return a mapping.
    """
    function = _function(configuration["call"])
    pl.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    figures = function(**configuration["arguments"])
    seconds = time.perf_counter() - started
    if not isinstance(figures, Mapping):
        raise StudyError(
            f"Expected {configuration['call']} to return a mapping of names to figures, but got {figures!r}."
        )
    metrics = {**keep_figures(figures, folder), "seconds": seconds}
    if wandb is not None:
        _log_figures(_wandb_logger(folder, wandb), configuration["arguments"], metrics, folder)
    return metrics


def _words(configuration: Mapping[str, Any], folder: Path) -> list[str]:
    """The command line: loud parts are off where the YAML does not ask for them."""
    trainer = configuration.get("trainer") or {}
    quiet = {
        "default_root_dir": str(folder),
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
    }
    words = ["--config", str(folder / "run.yaml"), "--trainer.logger", "false"]
    for name, value in quiet.items():
        if name not in trainer:
            words += [f"--trainer.{name}", value]
    return words


def _loggers(folder: Path, wandb: Mapping[str, Any] | None) -> list[Logger]:
    csv = CSVLogger(folder, name="", version="csv")
    return [csv] if wandb is None else [csv, _wandb_logger(folder, wandb)]


def _wandb_logger(folder: Path, wandb: Mapping[str, Any]) -> WandbLogger:
    close_run()
    return WandbLogger(**{"save_dir": str(folder.absolute()), **wandb})


def _log_figures(
    logger: WandbLogger, arguments: Mapping[str, Any], metrics: Mapping[str, float], folder: Path
) -> None:
    """What a function was given and has returned: curves by step, then numbers and pictures."""
    logger.log_hyperparams(dict(arguments))
    rows: dict[int, dict[str, float]] = {}
    for name, points in read_history(folder).items():
        for step, value in points:
            rows.setdefault(step, {})[name] = value
    for step, row in sorted(rows.items()):
        logger.log_metrics(row, step)
    logger.log_metrics(metrics)
    for file in sorted(folder.glob("*.png")):
        log_picture(logger, file.stem, file)


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"Expected `call` to be the dotted path of a function, but {path!r} cannot be imported: {error}. "
            "Correct the path, or install the package."
        ) from error
    if not callable(function):
        raise StudyError(f"Expected `call` to name a function, but {path} is {function!r}.")
    return function  # type: ignore[no-any-return]


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _last_logged(folder: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    for name, points in read_history(folder).items():
        values = [value for _, value in points]
        values = values[-LAST_PROBES:] if name.startswith(PROBED) else values[-1:]
        last[name] = sum(values) / len(values)
    return last
