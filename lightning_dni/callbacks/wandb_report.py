"""What Weights & Biases gets beyond a logger's rows: axes, summaries, pictures and files of a run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from lightning_dni.callbacks.gantt import draw_timeline
from lightning_dni.callbacks.heatmap import Probe, heatmap_pixels
from lightning_dni.callbacks.pictures import pixels_of
from lightning_dni.pipeline.clock import Span

AXIS = "trainer/global_step"
"""The key under which Lightning's logger writes its steps."""

PICTURE, TIMELINE = "dni_gradients", "dni_timeline"


class WandbReport:
    """The W&B runs of a trainer, or none; on every rank but the first there are none.

    A run is the one that the logger has opened: with `WandbLogger(id=...)` of an earlier run it is
    continued, and nothing here starts another.

    Args:
        trainer: Its loggers are searched for `WandbLogger`.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else []
        self._runs: list[Any] = [each.experiment for each in loggers if isinstance(each, WandbLogger)]
        for run in self._runs:
            run.define_metric(AXIS)
            run.define_metric("dni_*", step_metric=AXIS, step_sync=True)

    def summarize(self, values: Mapping[str, float]) -> None:
        """Set summaries; call it after the row is written, which sets them to the row's values."""
        for run in self._runs:
            run.summary.update(dict(values))

    def show_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table at `step`."""
        if self._runs:
            import wandb

            for run in self._runs:
                # a table each: it belongs to the run that logs it
                table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
                run.log({name: table, AXIS: step})

    def show(self, probes: Sequence[Probe], step: int, note: str) -> None:
        """Log the picture of `probes` at `step`, with a `note` in it and below."""
        if self._runs and probes:
            caption = f"cosine and relative error of synthetic gradients {note}".rstrip()
            self._log(PICTURE, heatmap_pixels(probes, note), caption, step)

    def show_timeline(self, stages: Mapping[int, Sequence[Span]], step: int) -> None:
        """Log the picture of what the `stages` did, at `step`."""
        if self._runs:
            self._log(TIMELINE, pixels_of(draw_timeline(stages)), "who computed what when", step)

    def show_figure(self, name: str, figure: Figure, caption: str, step: int) -> None:
        """Log `figure` as picture `name` at `step`."""
        if self._runs:
            self._log(name, pixels_of(figure), caption, step)

    def _log(self, name: str, pixels: npt.NDArray[np.uint8], caption: str, step: int) -> None:
        import wandb  # takes a second, and only here is it needed

        for run in self._runs:
            run.log({name: wandb.Image(pixels, caption=caption), AXIS: step})


def log_files(logger: WandbLogger, name: str, kind: str, files: Sequence[Path]) -> None:
    """Log `files` as one artifact of the logger's run.

    Args:
        logger: Its run is opened if it is not open.
        name: Of the artifact; characters that W&B does not take become underscores.
        kind: The artifact's type.
        files: Those that exist are added.
    """
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "_", name), type=kind)
    for file in files:
        if file.exists():
            artifact.add_file(str(file))
    logger.experiment.log_artifact(artifact)


def log_picture(logger: WandbLogger, name: str, file: Path) -> None:
    """Log a PNG file as an image of the logger's run."""
    import wandb

    logger.experiment.log({name: wandb.Image(str(file))})


def close_run(*, failed: bool = False) -> None:
    """Close the process's open W&B run, if there is one: the next logger would take it over."""
    import wandb

    wandb.finish(exit_code=1 if failed else 0)
