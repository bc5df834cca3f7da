"""The picture of a study: a metric over an axis or over steps, a line per value of another axis."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lightning_dni.callbacks.layers import short_names
from lightning_dni.study.configuration import Picture, Study
from lightning_dni.study.figures import read_history
from lightning_dni.study.folder import Result
from lightning_dni.study.images import draw_image, image_heights, images_of
from lightning_dni.study.names import drawable, in_natural_order, layers_of
from lightning_dni.study.table import CellResults, by_cell, mean_and_spread

STEP = "step"
FEW = 20
"""A curve of at most so many values shows them as points: a bare line between two looks like a trend."""


def draw_study(study: Study, results: Mapping[str, Result], out: Path) -> Figure:
    """Rows are metrics, columns the values of the axes in `panel`; bars and bands are standard deviations.

    Above them, where the picture asks for images, one of each line's first run.

    Args:
        study: Has a picture.
        results: By run.
        out: The study's folder, for curves over steps and images.
    """
    picture = study.picture
    assert picture is not None
    cells = [each for each in by_cell(study, results) if each.finished]
    panels = [dict(zip(picture.panel, names, strict=True)) for names in _combinations(study, picture)]
    images = images_of(study, picture, cells, panels, out)
    # a wide picture is shown small, with its words
    each, high = (5.5, 3.8) if len(panels) < 5 else (2.8, 2.6)
    width = max(each * len(panels), 7 if picture.images is None else 14)
    heights = [*image_heights(images, width / len(panels)), *[high] * len(picture.y)]
    figure = Figure(figsize=(width, sum(heights)), dpi=110, layout="constrained")
    grid = figure.subplots(len(heights), len(panels), squeeze=False, height_ratios=heights)
    for row, found in zip(grid, images, strict=False):
        for axes, image in zip(row, found, strict=True):
            draw_image(axes, image)
    charts = grid[len(images) :]
    for row, metric in enumerate(picture.y):
        for column, panel in enumerate(panels):
            shown = [each for each in cells if panel.items() <= each.cell.items()]
            axes = charts[row][column]
            if row or column:
                axes.sharex(charts[0][0])
            if column:
                axes.sharey(charts[row][0])
            _draw_panel(axes, study, picture, metric, shown, out)
            if row == 0:
                title = ", ".join(f"{axis}: {name}" for axis, name in panel.items())
                axes.set_title(drawable(title), fontsize=10)
            axes.label_outer()
        values = [each.values(metric) for each in cells]
        _cut_bars(charts[row][0], values if picture.x in study.axes else [])
    _add_legend(figure, picture)
    title = str(picture.title or study.recipe.get("claim", study.name))
    figure.suptitle(drawable(title), fontsize=11, wrap=True)
    return figure


def _combinations(study: Study, picture: Picture) -> Iterable[tuple[str, ...]]:
    return itertools.product(*(study.axes[axis] for axis in picture.panel))


def _draw_panel(
    axes: Axes, study: Study, picture: Picture, metric: str, cells: Sequence[CellResults], out: Path
) -> None:
    lines = study.axes[picture.line] if picture.line else [None]
    if study.over_layers:
        _draw_profiles(axes, picture, metric, cells, lines)
        return
    positions = None if picture.x == STEP else _Positions(study.axes[picture.x])
    for index, line in enumerate(lines):
        drawn = _of_line(picture, line, cells)
        color, label = f"C{index}", drawable(line or metric)
        if positions is None:
            _draw_curve(axes, metric, drawn, out, color, label)
        else:
            # named values: lines lie beside each other, not one over the other
            beside = picture.line is not None and not positions.numeric
            shift = 0.5 * ((index + 0.5) / len(lines) - 0.5) if beside else 0.0
            points = [(positions.of[each.cell[picture.x]] + shift, each.values(metric)) for each in drawn]
            _draw_points(axes, points, "-" if positions.numeric else "none", color, label)
    words = drawable(picture.words.get(metric, metric))
    axes.set(xlabel=drawable(picture.x), ylabel=words, yscale=picture.y_scale_of(metric))
    if positions is not None and not positions.numeric:
        axes.set_xticks(
            list(positions.of.values()),
            [drawable(name) for name in positions.of],
            rotation=20 if len(positions.of) < 10 else 50,
            ha="right",
        )
    else:
        axes.set_xscale(picture.x_scale)
        if positions is not None:
            axes.set_xticks(list(positions.of.values()), list(positions.of))
            axes.minorticks_off()
    _clear(axes)


def _of_line(picture: Picture, line: str | None, cells: Iterable[CellResults]) -> list[CellResults]:
    return [each for each in cells if line is None or each.cell[picture.line or ""] == line]


def _clear(axes: Axes) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0))
        )  # else less than a decade has one number
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_profiles(
    axes: Axes, picture: Picture, metric: str, cells: Sequence[CellResults], lines: Sequence[str | None]
) -> None:
    """The metrics `METRIC/LAYER` over the layers, mean and band of one standard deviation per line."""
    known = {name for each in cells for _, result in each.finished for name in result.metrics}
    layers = in_natural_order({layer for y in picture.y for layer in layers_of(y, known)})
    for index, line in enumerate(lines):
        drawn = _of_line(picture, line, cells)
        found = {
            place: values
            for place, layer in enumerate(layers)
            if (values := [value for each in drawn for value in each.values(f"{metric}/{layer}")])
        }
        _draw_band(axes, found, f"C{index}", drawable(line or metric), marker=".")
    for cut in picture.cuts:
        if cut in layers:
            axes.axvline(layers.index(cut) + 0.5, color="black", linestyle="--", linewidth=1)
    numbers, every = short_names(layers), math.ceil(len(layers) / 24) or 1
    counted = any(not layer.endswith(number) for layer, number in zip(layers, numbers, strict=True))
    axes.set(xlabel=f"{picture.x}, counted from 1" if counted else picture.x)
    axes.set(ylabel=drawable(picture.words.get(metric, metric)), yscale=picture.y_scale_of(metric))
    axes.set_xticks(range(0, len(layers), every), numbers[::every])
    _clear(axes)


class _Positions:
    """Where the values of an axis lie: at their numbers where all are, else side by side."""

    def __init__(self, names: Sequence[str]) -> None:
        try:
            self.of = {name: float(name) for name in names}
            self.numeric = len(names) > 1 and all(map(math.isfinite, self.of.values()))
        except ValueError:
            self.numeric = False
        if not self.numeric:
            self.of = {name: float(index) for index, name in enumerate(names)}


def _draw_points(
    axes: Axes, points: Sequence[tuple[float, list[float]]], style: str, color: str, label: str
) -> None:
    """Mean and bar at each place, and a small point for each seed."""
    found = sorted((place, values) for place, values in points if values)
    if not found:
        return
    summaries = [mean_and_spread(values) for _, values in found]
    means, spreads = [m for m, _ in summaries], [0.0 if math.isnan(s) else s for _, s in summaries]
    places = [place for place, _ in found]
    axes.errorbar(
        places, means, yerr=spreads, color=color, label=label, linestyle=style, marker="o", capsize=3
    )
    for place, values in found:
        axes.plot([place] * len(values), values, linestyle="none", marker=".", color=color, alpha=0.45)


def _cut_bars(axes: Axes, values: Iterable[Sequence[float]]) -> None:
    """A bar that ends near 0 would stretch a log axis over decades without a point."""
    found = [place for each in values if each for place in (*each, mean_and_spread(each)[0])]
    places = [place for place in found if 0 < place < math.inf]
    if places and axes.get_yscale() == "log":
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(places) / 1.5))


def _draw_curve(
    axes: Axes, metric: str, cells: Sequence[CellResults], out: Path, color: str, label: str
) -> None:
    """Mean over runs at each step, with a band of one standard deviation."""
    found: dict[int, list[float]] = {}
    for each in cells:
        for run, _ in each.finished:
            for step, value in read_history(out / run.name).get(metric, []):
                found.setdefault(step, []).append(value)
    _draw_band(axes, found, color, label, marker="." if len(found) <= FEW else "")


def _draw_band(
    axes: Axes, found: Mapping[int, Sequence[float]], color: str, label: str, marker: str = ""
) -> None:
    """A line through the means at each place, and a band of one standard deviation."""
    if not found:
        return
    places = sorted(found)
    summaries = [mean_and_spread(found[place]) for place in places]
    means, spreads = [m for m, _ in summaries], [0.0 if math.isnan(s) else s for _, s in summaries]
    axes.plot(places, means, color=color, label=label, marker=marker)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def _add_legend(figure: Figure, picture: Picture) -> None:
    """One for all panels: a line may be missing in some."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found.update(dict(zip(labels, handles, strict=True)))
    if picture.line is not None and found and picture.line != picture.x:
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=6,
            title=drawable(picture.line),
            fontsize=9,
        )
