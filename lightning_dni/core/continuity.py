"""Whether sequences go on at a truncation at all; where none ever does, that is told once."""

import warnings
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

PATIENCE = 20
"""Training steps after which a sequence should have gone on."""


class Continuity:
    """What has been seen of the states that come into truncations."""

    def __init__(self) -> None:
        self._steps: Counter[str] = Counter()
        self._went_on: dict[str, Tensor] = {}

    def see(self, name: str, rows: Tensor) -> None:
        """Take note of which `rows` go on from the end of a chunk; waits for nothing."""
        if self._steps[name] < PATIENCE:
            went_on = rows.any()
            self._went_on[name] = went_on | self._went_on.get(name, went_on)

    def end_step(self, names: Iterable[str]) -> None:
        """Count a step of truncations `names`; once, look at what was seen, and warn where that is none."""
        for name in names:
            self._steps[name] += 1
            if self._steps[name] != PATIENCE:
                continue
            went_on = self._went_on.pop(name, None)
            if went_on is None or not bool(went_on):
                warnings.warn(
                    f"No sequence has gone on at truncation {name!r} in {PATIENCE} training steps, so its "
                    "estimator learns nothing but zero: no state came in as it had gone out. Hand on all of "
                    "its tensors as the module returned them, and begin anew in the rows of new sequences "
                    "only; see docs/recurrent.md.",
                    stacklevel=2,
                )
