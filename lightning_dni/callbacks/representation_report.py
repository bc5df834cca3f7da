"""What RepresentationMonitor finds, its picture and its table."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_dni.callbacks.engine import key_of
from lightning_dni.callbacks.layers import short_names

COLUMNS = (
    "layer",
    "boundary",
    "distance to last layer",
    "probe, training accuracy",
    "probe, test accuracy",
    "squared norm of weights, share",
)
PER_ROW = 8
PER_STRIP = 20
HIGHEST = 1.5
"""The end of the color scale; only samples that layers make opposites of are further apart."""


@dataclass(frozen=True)
class Representations:
    """The curves over layers, in forward order.

    Attributes:
        step: Optimizer steps before.
        distance: Distance of the within-class blocks of the dissimilarity matrix to those of the last layer.
        train_accuracy: Of a linear probe on the samples it was fitted to; empty without probes.
        test_accuracy: On as many others.
        weight_norm: Squared norm of the weights as a share of the sum over layers; of layers with weights.
        norm_slope: Of that share, per layer, over layers of the usual size; None where it is not known.
    """

    step: int
    distance: Mapping[str, float]
    train_accuracy: Mapping[str, float]
    test_accuracy: Mapping[str, float]
    weight_norm: Mapping[str, float]
    norm_slope: float | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names in forward order."""
        return tuple(self.distance)

    def state_dict(self) -> dict[str, Any]:
        """The curves in primitives."""
        curves = {name: dict(getattr(self, name)) for name in CURVES}
        return {"step": self.step, **curves, "norm_slope": self.norm_slope}

    def as_metrics(self) -> dict[str, float]:
        """The curves as metrics of one step: `dni_layer_<curve>/<layer>`; the slope of norms and its sign."""
        metrics = {
            key_of(f"dni_layer_{name}", layer): value
            for name in CURVES
            for layer, value in getattr(self, name).items()
        }
        if self.norm_slope is None:
            return metrics
        sign = float((self.norm_slope > 0) - (self.norm_slope < 0))
        return metrics | {"dni_norm_slope": self.norm_slope, "dni_norm_slope_sign": sign}

    def rows(self, cuts: Collection[str]) -> list[list[Any]]:
        """One row per layer, with the columns `COLUMNS`; None where nothing was measured.

        Args:
            cuts: Names of layers behind which the network is cut.
        """
        curves = [getattr(self, name) for name in CURVES]
        return [[layer, layer in cuts, *(c.get(layer) for c in curves)] for layer in self.layers]


CURVES = ("distance", "train_accuracy", "test_accuracy", "weight_norm")


def draw_representations(
    found: Representations, matrices: Mapping[str, Tensor], cuts: Collection[str]
) -> Figure:
    """The dissimilarity matrix of every layer, and below them the curves; cuts are in red.

    Args:
        found: The curves.
        matrices: By layer, samples in the order of their classes.
        cuts: Names of layers behind which the network is cut.
    """
    layers = list(matrices)
    columns = min(PER_ROW, max(3, len(layers)))
    lines = math.ceil(len(layers) / columns)
    width, upper, lower = 1.6 * columns + 1.2, 1.8 * lines + 0.4, 3.2
    figure = Figure(figsize=(width, upper + lower), dpi=110)
    border = lower / (upper + lower)
    _draw_matrices(figure, matrices, cuts, (lines, columns), (border, 1 - 0.4 / (upper + lower)))
    margin = 0.6 / width
    grid = figure.add_gridspec(
        1,
        3,
        left=margin,
        right=1 - 0.3 * margin,
        bottom=0.6 / (upper + lower),
        top=border * 0.86,
        wspace=0.25,
    )
    distance, accuracy, norm = (figure.add_subplot(grid[0, k]) for k in range(3))
    places = [k for k, layer in enumerate(layers, start=1) if layer in cuts]
    _draw_curve(distance, layers, places, "distance to the last layer", [("", found.distance, "-")])
    both = [("training", found.train_accuracy, "--"), ("test", found.test_accuracy, "-")]
    _draw_curve(accuracy, layers, places, "accuracy of a linear probe", both if found.train_accuracy else [])
    _draw_curve(norm, layers, places, "squared norm of the weights, share", [("", found.weight_norm, "-")])
    return figure


def _draw_matrices(
    figure: Figure,
    matrices: Mapping[str, Tensor],
    cuts: Collection[str],
    shape: tuple[int, int],
    room: tuple[float, float],
) -> None:
    """One after the other in rows, in the part of the figure between the heights in `room`."""
    bottom, top = room
    figure.suptitle(
        "Dissimilarity of samples in the order of their classes (0: alike, 1: uncorrelated)", y=0.99
    )
    right = 1 - 0.8 / figure.get_figwidth()
    grid = figure.add_gridspec(
        *shape, left=0.01, right=right, bottom=bottom, top=top - 0.01, wspace=0.05, hspace=0.15
    )
    colors = Normalize(0, HIGHEST)
    for k, (layer, matrix) in enumerate(matrices.items()):
        axes = figure.add_subplot(grid[divmod(k, shape[1])])
        axes.imshow(matrix.numpy(), norm=colors, cmap="viridis", interpolation="nearest")
        _mark(axes, layer, layer in cuts, 8.0)
    bar = figure.add_axes((right + 0.01, bottom, 0.12 / figure.get_figwidth(), 0.8 * (top - bottom)))
    figure.colorbar(ScalarMappable(colors, "viridis"), cax=bar)


def _mark(axes: Axes, title: str, is_cut: bool, font_size: float) -> None:
    """A matrix' title and, behind a layer at which the network is cut, a red line."""
    axes.set_title(title, fontsize=font_size, pad=3, color="firebrick" if is_cut else "black")
    axes.set_axis_off()
    if is_cut:
        axes.plot(
            [1.03, 1.03], [0, 1], transform=axes.transAxes, clip_on=False, color="firebrick", linewidth=2
        )


def draw_dissimilarities(matrices: Mapping[str, Tensor], cuts: Collection[str]) -> Figure:
    """The matrices alone, small, with their color scale: to be set below those of another training.

    Args:
        matrices: By layer, samples in the order of their classes.
        cuts: Names of layers behind which the network is cut; a red line follows them.
    """
    columns = min(PER_STRIP, len(matrices))
    lines = math.ceil(len(matrices) / columns)
    width, right, top = 0.7 * columns + 0.7, 0.7 * columns + 0.05, 1 - 0.16 / lines
    figure = Figure(figsize=(width, 0.88 * lines), dpi=110)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    figure.subplots_adjust(0.005, 0.01, right / width, top, 0.1, 0.25)
    names, colors = short_names(list(matrices)), Normalize(0, HIGHEST)
    for axes, name, (layer, matrix) in zip(grid, names, matrices.items(), strict=False):
        axes.imshow(matrix.numpy(), norm=colors, cmap="viridis")
        _mark(axes, name, layer in cuts, 7.0)
    bar = figure.add_axes(((right + 0.12) / width, 0.06, 0.1 / width, top - 0.1))
    figure.colorbar(ScalarMappable(colors, "viridis"), cax=bar, ticks=(0, 1))
    bar.tick_params(labelsize=7)
    bar.set_ylabel("dissimilarity", fontsize=7)
    for axes in grid[len(matrices) :]:
        axes.set_axis_off()
    return figure


def _draw_curve(
    axes: Axes,
    layers: Sequence[str],
    cuts: Sequence[int],
    title: str,
    curves: Sequence[tuple[str, Mapping[str, float], str]],
) -> None:
    for cut in cuts:
        axes.axvline(cut + 0.5, color="firebrick", linewidth=0.8, alpha=0.6)
    for label, curve, style in curves:
        places = [k for k, layer in enumerate(layers, start=1) if layer in curve]
        axes.plot(places, [curve[layers[k - 1]] for k in places], style, marker=".", color="C0", label=label)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer, counted from 1 at the input")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
