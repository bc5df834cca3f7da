"""What a function returned, and what was logged: numbers, curves, pictures, on disk."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_dni.callbacks.pictures import write_figure
from lightning_dni.errors import StudyError

HISTORY = "csv/metrics.csv"


def keep_figures(figures: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Write curves and pictures into `folder`; the numbers come back.

    Args:
        figures: Numbers, curves (sequences of numbers, or tensors and arrays of one dimension), and
            matplotlib figures. A curve `step` says at which steps the entries of the others were taken.
        folder: Of the run.

    Raises:
        StudyError: Something is none of these, or a curve is longer than `step`.
    """
    numbers: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, value in figures.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, Figure):
            write_figure(value, folder / f"{name}.png")
        elif isinstance(value, (int, float)):
            numbers[name] = float(value)
        elif _is_curve(value):
            curves[name] = [float(each) for each in value]
        else:
            raise StudyError(
                f"Expected the figure {name!r} to be a number, a sequence of numbers or a matplotlib figure, "
                f"but got {value!r}. Leave it out of what the function returns."
            )
    steps = curves.pop("step", None)
    if curves:
        longest = max(curves, key=lambda name: len(curves[name]))
        if steps is not None and len(steps) < len(curves[longest]):
            raise StudyError(
                f"Expected the curve `step` to have an entry for each of {longest!r}, but it has "
                f"{len(steps)} for {len(curves[longest])}. Return as many, or no curve `step`."
            )
        _write_history(curves, [*map(round, steps or range(len(curves[longest])))], folder / HISTORY)
    last = {name: values[-1] for name, values in curves.items() if values}
    return last | numbers


def _is_curve(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return False
    return all(isinstance(each, (int, float)) or getattr(each, "ndim", None) == 0 for each in value)


def _write_history(curves: Mapping[str, Sequence[float]], steps: Sequence[int], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["step", *curves])
        writer.writeheader()
        for place, step in enumerate(steps):
            values = {name: values[place] for name, values in curves.items() if place < len(values)}
            writer.writerow({"step": step, **values})


def read_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What was logged in a run, by name: steps and values."""
    history: dict[str, list[tuple[int, float]]] = {}
    file = folder / HISTORY
    if not file.exists():
        return history
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            for name, text in row.items():
                if name != "step" and text:
                    history.setdefault(name, []).append((round(float(row["step"])), float(text)))
    return history
