"""Pictures of losses: the implicit ones beside the true one, and the counter-example's surface."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_dni.analysis.counter_example import Surface, Trajectory
from lightning_dni.analysis.implicit import LossSurfaces


def draw_loss_surfaces(surfaces: LossSurfaces | Mapping[str, LossSurfaces], title: str = "") -> Figure:
    """A row for each label; a column for the true loss, if it is known, and one for each boundary.

    Every panel has a color scale of its own, written over it: an implicit loss is free up to a constant for
    each class.

    Args:
        surfaces: What to draw, over a grid as `plane` gives it; or several of one network, by what is
            written beside their rows, such as the step.
        title: Of the figure.
    """
    moments = {"": surfaces} if isinstance(surfaces, LossSurfaces) else surfaces
    rows = [
        (moment, found, label)
        for moment, found in moments.items()
        for label in range(len(next(iter(found.implicit.values()))))
    ]
    columns = len(_columns(rows[0][1]))
    width, height = 0.9 + 2.4 * columns, 1.1 + 2.5 * len(rows)
    figure = Figure(figsize=(width, height), dpi=110)
    panels = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    # fixed, since a layout that is solved takes longer than all the rest
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.95 / height, 0.12, 0.3)
    figure.suptitle(title or "Losses that the estimators implement, up to a constant per label")
    for place, (moment, found, label) in enumerate(rows):
        correlations = {} if found.true is None else found.correlations()
        for axes, (name, values) in zip(panels[place], _columns(found).items(), strict=True):
            said = _draw_surface(axes, found, values[label])
            if name in correlations:
                said += f", corr. {float(correlations[name][label]):.2f}"
            axes.set_title(f"{name}\n{said}" if place == 0 else said, fontsize=9)
        panels[place, 0].set_ylabel(f"{moment}, label {label}\nsecond input".removeprefix(", "))
    for axes in panels[-1]:
        axes.set_xlabel("first input")
    return figure


def _columns(surfaces: LossSurfaces) -> dict[str, Tensor]:
    known = {} if surfaces.true is None else {"true loss": surfaces.true}
    return known | dict(surfaces.implicit)


def _draw_surface(axes: Axes, surfaces: LossSurfaces, values: Tensor) -> str:
    """Draw one surface; says between which values its colors run."""
    side = round(len(values) ** 0.5)
    x, y, z = (each.reshape(side, side).T for each in (*surfaces.points.numpy().T, values.numpy()))
    # pixels are around their points
    half = [(axis[-1] - axis[0]) / (side - 1) / 2 for axis in (x[0], y[:, 0])]
    extent = (x[0, 0] - half[0], x[0, -1] + half[0], y[0, 0] - half[1], y[-1, 0] + half[1])
    axes.imshow(z, origin="lower", extent=extent, aspect="auto", cmap="viridis")
    if np.ptp(z) > 0:
        axes.contour(x, y, z, levels=8, colors="white", linewidths=0.5, alpha=0.6)
    return f"{z.min():.3g} to {z.max():.3g}"


def draw_counter_example(surface: Surface, runs: Mapping[str, Trajectory]) -> Figure:
    """The loss over slope and offset, the spurious region hatched, and where each run went.

    Args:
        surface: The loss surface.
        runs: Trajectories by name, in the order of the legend.
    """
    figure = Figure(figsize=(10, 4.8), dpi=110, layout="constrained")
    plan, curve = figure.subplots(1, 2)
    a, b, loss, spurious = (each.numpy() for each in surface)
    filled = plan.contourf(a, b, loss.T, levels=20, cmap="Greys", alpha=0.7)
    figure.colorbar(filled, ax=plan, pad=0.02).set_label("loss")
    with_hatches = plan.contourf(
        a, b, spurious.T.astype(float), levels=[0.5, 1.5], colors="none", hatches=["//"]
    )
    with_hatches.set_edgecolor("tab:red")
    with_hatches.set_linewidth(0.0)
    for place, (name, run) in enumerate(runs.items()):
        color, below = f"C{place}", 3 - 0.1 * place  # ways share parts: a later one is below, and wider
        slopes, offsets = run.parameters[:, 0].numpy(), run.parameters[:, 1].numpy()
        plan.plot(slopes, offsets, color=color, lw=1.2 + 1.4 * place, zorder=below)
        plan.plot(slopes[0], offsets[0], "o", color="black", ms=9, mfc="none", zorder=4)
        plan.plot(
            slopes[-1], offsets[-1], "X", color=color, ms=7 + 3 * place, mec="white", zorder=below + 0.5
        )
        said = f"{name}: ends at {float(run.losses[-1]):.2g}"
        curve.plot(run.losses.numpy(), color=color, lw=1.2 + 0.8 * place, zorder=below, label=said)
    plan.set(xlabel="slope a", ylabel="offset b")
    plan.set_title("o start, x end\nhatched: a constant SG at rest stops the net", fontsize=10)
    curve.set(xlabel="step", ylabel="loss")
    curve.set_xscale("symlog")  # most of it happens in the first hundredth of the steps
    curve.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(runs), fontsize=9)
    figure.suptitle("f(x) = ax + b on {-2, -1, 1, 2}, loss the sum of |f(x)|")
    return figure
