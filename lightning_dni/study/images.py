"""Pictures of single runs set one below the other in that of a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.image import imread

from lightning_dni.study.configuration import Picture, Study
from lightning_dni.study.names import drawable, in_natural_order
from lightning_dni.study.table import CellResults

TITLE = 0.3
"""Inches above an image."""


class RunImage(NamedTuple):
    """What a run has drawn, and what it is called."""

    title: str
    pixels: npt.NDArray[np.float32]


def images_of(
    study: Study,
    picture: Picture,
    cells: Sequence[CellResults],
    panels: Sequence[Mapping[str, str]],
    out: Path,
) -> list[list[RunImage | None]]:
    """A row for each value on the axis of lines, a column for each panel; of the first run that has the file.

    Args:
        study: The study.
        picture: Says which file; a pattern means the last that it matches.
        cells: What has finished.
        panels: The values on other axes, of each column.
        out: The study's folder.
    """
    if picture.images is None:
        return []
    lines = [{picture.line: name} for name in study.axes[picture.line]] if picture.line else [{}]
    found = [
        [
            _image(
                [each for each in cells if {**line, **panel}.items() <= each.cell.items()],
                line,
                picture.images,
                out,
            )
            for panel in panels
        ]
        for line in lines
    ]
    return [row for row in found if any(row)]


def _image(cells: Sequence[CellResults], line: Mapping[str, str], pattern: str, out: Path) -> RunImage | None:
    for each in cells:
        for run, _ in each.finished:
            files = in_natural_order([str(file) for file in (out / run.name).glob(pattern)])
            if files:
                said = [f"{axis}: {name}" for axis, name in line.items()] + [f"seed {run.seed}"]
                return RunImage(", ".join(said), imread(files[-1]))
    return None


def image_heights(images: Sequence[Sequence[RunImage | None]], width: float) -> list[float]:
    """Inches of every row, where a column has so many."""
    ratios = [max(e.pixels.shape[0] / e.pixels.shape[1] for e in row if e is not None) for row in images]
    return [TITLE + ratio * width for ratio in ratios]


def draw_image(axes: Axes, image: RunImage | None) -> None:
    """Nothing but the image and its title."""
    axes.set_axis_off()
    if image is not None:
        axes.imshow(image.pixels)
        axes.set_title(drawable(image.title), fontsize=10, loc="left", pad=2)
