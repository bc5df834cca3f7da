"""Picture of who computed what when: one line per stage, time to the right."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_dni.pipeline.clock import BUSY, Activity, Span

FILE_NAME = "dni_timeline.png"

COLORS = {
    Activity.FORWARD: "#4c78a8",
    Activity.BACKWARD: "#54a24b",
    Activity.OPTIMIZER: "#b79a20",
    Activity.ESTIMATOR: "#9d755d",
    Activity.WAIT_IN: "#f4b6b3",
    Activity.WAIT_OUT: "#d66a63",
    Activity.OTHER: "#e4e4e4",
}
NAMES = {
    Activity.FORWARD: "forward",
    Activity.BACKWARD: "backward",
    Activity.OPTIMIZER: "optimizer",
    Activity.ESTIMATOR: "estimator",
    Activity.WAIT_IN: "waits for input",
    Activity.WAIT_OUT: "waits to send",
    Activity.OTHER: "data, logging, callbacks",
}


def draw_timeline(stages: Mapping[int, Sequence[Span]]) -> Figure:
    """One line per stage, the last one on top; numbers are those of training batches.

    Args:
        stages: What was recorded on each stage, on one clock.

    Raises:
        ValueError: Nothing was recorded.
    """
    spans = [span for found in stages.values() for span in found]
    if not spans:
        raise ValueError("Expected `stages` to hold at least one span, but got none. Record for more steps.")
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    figure = Figure(figsize=(12, 1.7 + 0.5 * len(stages)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for stage, found in stages.items():
        _draw_stage(axes, stage, found, start, end - start)
    first, last = min(span.step for span in spans), max(span.step for span in spans)
    axes.set_title(
        f"Who computed what when, in training batches {first} to {last} (the number on a forward pass)",
        fontsize=11,
    )
    axes.set_xlim(0, (end - start) * 1e3)
    axes.set_xlabel("milliseconds")
    axes.set_yticks(list(stages), [f"stage {stage}" for stage in stages])
    axes.set_ylim(min(stages) - 0.5, max(stages) + 0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = [activity for activity in COLORS if any(span.activity is activity for span in spans)]
    handles = [Patch(color=COLORS[activity], label=NAMES[activity]) for activity in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _draw_stage(axes: Axes, stage: int, spans: Sequence[Span], start: float, whole: float) -> None:
    for activity, color in COLORS.items():
        bars = [((s.start - start) * 1e3, (s.end - s.start) * 1e3) for s in spans if s.activity is activity]
        axes.broken_barh(bars, (stage - 0.4, 0.8), facecolors=color, linewidth=0)
    for span in _widest_forwards(spans):
        if span.end - span.start > whole / 90:
            middle = ((span.start + span.end) / 2 - start) * 1e3
            axes.text(middle, stage, str(span.step), ha="center", va="center", color="white", fontsize=9)
    busy = sum(span.end - span.start for span in spans if span.activity in BUSY)
    recorded = sum(span.end - span.start for span in spans)
    share = f"{busy / recorded:.0%} busy" if recorded else ""
    axes.text(1.005, stage, share, transform=axes.get_yaxis_transform(), va="center", fontsize=9)


def _widest_forwards(spans: Sequence[Span]) -> list[Span]:
    """Of each batch the longest stretch of its forward pass."""
    widest: dict[int, Span] = {}
    for span in spans:
        if span.activity is Activity.FORWARD:
            known = widest.get(span.step)
            if known is None or span.end - span.start > known.end - known.start:
                widest[span.step] = span
    return list(widest.values())
