"""Pictures of losses: the implicit ones beside the true one, and the counter-example's surface."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_dni.analysis.counter_example import Surface, Trajectory
from lightning_dni.analysis.implicit import LossSurfaces


def draw_loss_surfaces(surfaces: LossSurfaces, title: str = "") -> Figure:
    """A row for each label; a column for the true loss, if it is known, and one for each boundary.

    Every panel has a color scale of its own: an implicit loss is free up to a constant for each class.

    Args:
        surfaces: What to draw, over a square grid as `plane` gives it.
        title: Of the figure.
    """
    known = surfaces.true is not None
    columns = ({"true loss": surfaces.true} if known else {}) | dict(surfaces.implicit)
    correlations = surfaces.correlations() if known else {}
    classes = len(next(iter(surfaces.implicit.values())))
    figure = Figure(figsize=(0.6 + 2.6 * len(columns), 0.7 + 2.4 * classes), dpi=110, layout="constrained")
    panels = figure.subplots(classes, len(columns), squeeze=False, sharex=True, sharey=True)
    figure.suptitle(title or "Loss that each boundary's estimator implements, up to a constant per label")
    for place, (name, values) in enumerate(columns.items()):
        assert values is not None
        for label in range(classes):
            axes = panels[label, place]
            _draw_surface(axes, surfaces, values[label].numpy())
            lines = [name] if label == 0 else []
            if name in correlations:
                lines.append(f"correlation {float(correlations[name][label]):.2f}")
            axes.set_title("\n".join(lines), fontsize=9)
            if place == 0:
                axes.set_ylabel(f"label {label}\nsecond input")
            if label == classes - 1:
                axes.set_xlabel("first input")
    return figure


def _draw_surface(axes: Axes, surfaces: LossSurfaces, values: np.ndarray) -> None:
    side = round(len(values) ** 0.5)
    x, y, z = (each.reshape(side, side) for each in (*surfaces.points.numpy().T, values))
    mesh = axes.pcolormesh(x, y, z, cmap="viridis", shading="gouraud")
    if np.ptp(z) > 0:
        axes.contour(x, y, z, levels=8, colors="white", linewidths=0.5, alpha=0.6)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.colorbar(mesh, ax=axes, pad=0.02).ax.tick_params(labelsize=7)


def draw_counter_example(surface: Surface, runs: Mapping[str, Trajectory]) -> Figure:
    """The loss over slope and offset, the spurious region hatched, and where each run went.

    Args:
        surface: The loss surface.
        runs: Trajectories by name, in the order of the legend.
    """
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
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
        color = f"C{place}"
        slopes, offsets = run.parameters[:, 0].numpy(), run.parameters[:, 1].numpy()
        plan.plot(slopes, offsets, color=color, lw=1.5, label=name)
        plan.plot(slopes[0], offsets[0], "o", color=color, ms=5)
        plan.plot(slopes[-1], offsets[-1], "X", color=color, ms=8, mec="white")
        curve.plot(run.losses.numpy(), color=color, label=f"{name}: ends at {float(run.losses[-1]):.3g}")
    plan.set(xlabel="slope a", ylabel="offset b", title="hatched: a constant module at rest stops the net")
    curve.set(xlabel="step", ylabel="loss", title="o start, X end")
    curve.set_ylim(bottom=0)
    curve.legend()
    figure.suptitle("f(x) = ax + b on {-2, -1, 1, 2}, loss the sum of |f(x)|")
    return figure
