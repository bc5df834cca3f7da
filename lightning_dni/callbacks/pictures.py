"""Where a callback's pictures go: into the log directory of a run, or into W&B as pixels."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def picture_path(trainer: pl.Trainer, name: str) -> Path | None:
    """The file for a picture in the log directory; None where W&B alone gets it, and on ranks but 0."""
    others = [each for each in trainer.loggers if not isinstance(each, WandbLogger)]
    if not trainer.is_global_zero or (trainer.loggers and not others):
        return None
    directories = [each.log_dir or each.save_dir for each in others]
    return Path(next(filter(None, directories), trainer.default_root_dir)) / name


def write_figure(figure: Figure, path: str | Path) -> Path:
    """Draw `figure` into a PNG file, whose folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def pixels_of(figure: Figure) -> npt.NDArray[np.uint8]:
    """The picture as `[height, width, 4]` RGBA values."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8).copy()
