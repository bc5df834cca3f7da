"""Picture of how well each boundary's synthetic gradient follows the true one, over the steps of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_dni.callbacks.pictures import pixels_of, write_figure

FILE_NAME = "dni_gradients.png"
WORST_FACTOR = 1e3
"""Errors further than this factor from one are drawn as if they were at it, and marked so."""


@dataclass(frozen=True)
class Probe:
    """What one probe measured, by boundary in forward order.

    Attributes:
        step: The step at which loggers have it.
        cosine: Cosine of synthetic and true gradient.
        error: Norm of their difference over the norm of the true one.
    """

    step: int
    cosine: Mapping[str, float]
    error: Mapping[str, float]

    def state_dict(self) -> dict[str, Any]:
        """The probe in primitives."""
        return {"step": self.step, "cosine": dict(self.cosine), "error": dict(self.error)}


def write_heatmap(probes: Sequence[Probe], path: str | Path, note: str = "") -> Path:
    """Draw `probes` into a PNG file, whose folder is made if needed; a `note` stands below the title.

    Raises:
        ValueError: There is no probe.
    """
    return write_figure(draw_heatmap(probes, note), path)


def heatmap_pixels(probes: Sequence[Probe], note: str = "") -> npt.NDArray[np.uint8]:
    """The same picture as `[height, width, 4]` RGBA values.

    Raises:
        ValueError: There is no probe.
    """
    return pixels_of(draw_heatmap(probes, note))


def draw_heatmap(probes: Sequence[Probe], note: str = "") -> Figure:
    """A row per boundary, the one next to the loss on top, a column per probe, and a `note` below the title.

    Raises:
        ValueError: There is no probe.
    """
    if not probes:
        raise ValueError(
            "Expected `probes` to hold at least one probe, but got none. Train for more steps, or lower "
            "GradientMonitor's `every_n_train_steps`."
        )
    boundaries = list(dict.fromkeys(name for probe in probes for name in probe.cosine))
    edges = _edges([probe.step for probe in probes])
    row = min(0.32, max(0.11, 6 / len(boundaries)))  # inches: a tall picture for many, down to small print
    figure = Figure(figsize=(9, 1.7 + 2 * (0.5 + row * len(boundaries))), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(
        "Synthetic against true gradient, the boundary next to the loss on top (grey: not a number)"
        f"\n{note}".rstrip()
    )
    cosines = _table([probe.cosine for probe in probes], boundaries)
    bar = _draw(upper, edges, cosines, "RdBu", Normalize(-1, 1))
    bar.set_label("cosine")
    errors = _table([probe.error for probe in probes], boundaries)
    widest = _widest_factor(errors)
    bar = _draw(lower, edges, np.clip(errors, 1 / widest, widest), "PuOr_r", LogNorm(1 / widest, widest))
    _label_errors(bar, widest, errors)
    for axes in (upper, lower):
        axes.set_yticks(range(len(boundaries)), boundaries, fontsize=min(10.0, 60 * row))
        axes.set_ylabel("boundary")
    lower.set_xlabel("optimizer step")
    if len(probes) > 8:
        lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        lower.set_xticks([probe.step for probe in probes])
    return figure


def _draw(
    axes: Axes,
    edges: npt.NDArray[np.float64],
    table: npt.NDArray[np.float64],
    colors: str,
    scale: Normalize,
) -> Colorbar:
    rows = np.arange(len(table) + 1) - 0.5
    axes.set_facecolor("0.75")  # shows through where a value is not a number
    mesh = axes.pcolormesh(edges, rows, np.ma.masked_invalid(table), cmap=colors, norm=scale)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure.colorbar(mesh, ax=axes, pad=0.02)


def _label_errors(bar: Colorbar, widest: float, errors: npt.NDArray[np.float64]) -> None:
    """Plain numbers on a logarithmic scale, and at its ends what else is drawn in their colours."""
    decades = [10.0**k for k in range(-3, 4)]
    ticks = decades if widest > 10 else [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    shown = [tick for tick in ticks if 1 / widest <= tick * 1.001 and tick <= widest * 1.001]
    beyond = bool((errors > WORST_FACTOR).any()), bool((errors < 1 / WORST_FACTOR).any())
    marks = {shown[-1]: "≥ " * beyond[0], shown[0]: "≤ " * beyond[1]}
    bar.set_ticks(shown, labels=[f"{marks.get(tick, '')}{tick:g}" for tick in shown])
    bar.minorticks_off()
    bar.set_label("relative error\n(1: as far off as zero)")


def _table(values: Sequence[Mapping[str, float]], boundaries: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([[column.get(name, math.nan) for column in values] for name in boundaries])


def _edges(steps: Sequence[int]) -> npt.NDArray[np.float64]:
    """Borders of the columns, half way between neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    centers = np.array(steps, dtype=np.float64)
    middles = (centers[:-1] + centers[1:]) / 2
    first, last = 2 * centers[0] - middles[0], 2 * centers[-1] - middles[-1]
    return np.concatenate([[first], middles, [last]])


def _widest_factor(errors: npt.NDArray[np.float64]) -> float:
    """How far from one the scale reaches: as far as the errors, between 2 and `WORST_FACTOR`."""
    known = np.clip(errors[~np.isnan(errors)], 1 / WORST_FACTOR, WORST_FACTOR)
    return max(2.0, float(np.exp(np.abs(np.log(known)).max(initial=0.0))))
