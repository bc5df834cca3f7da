"""What was measured: single trainings in results.csv, costs of a step in costs.csv."""

import csv
from functools import cache
from pathlib import Path

RESULTS, COSTS = (Path(__file__).with_name(name) for name in ("results.csv", "costs.csv"))
Found = dict[str, str]


def read(path: Path = RESULTS) -> list[Found]:
    """What was measured so far."""
    return _read(path, path.stat().st_size) if path.exists() else []


@cache
def _read(path: Path, size: int) -> list[Found]:
    with path.open() as file:
        return list(csv.DictReader(file))


def matching(key: Found, path: Path = RESULTS) -> list[Found]:
    """All that has these values, as it was written."""
    return [found for found in read(path) if key.items() <= found.items()]


def rates_of(found: Found) -> Found:
    """The learning rates of a training."""
    return {name: found[name] for name in ("rate", "estimator_rate")}


def best(grid: list[Found]) -> Found:
    """The training with the lowest validation error; of equal ones that with the lowest rates."""
    return min(grid, key=lambda found: [float(found[name]) for name in ("val_error", *rates_of(found))])
