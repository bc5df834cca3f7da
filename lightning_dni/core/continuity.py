"""Whether sequences go on at a truncation at all; where none ever does, that is told once."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dni.core.carry import to_rows

PATIENCE = 20
"""Training steps after which a sequence should have gone on."""


@dataclass
class _Seen:
    """What came in at one truncation.

    Attributes:
        steps: Number of steps since somebody looked.
        went_on: Whether a row went on from the end of a chunk; None where no state came in that could.
        strange: Whether one did not that was not zero either.
    """

    steps: int = 0
    went_on: Tensor | None = None
    strange: Tensor | None = None


class Continuity:
    """What has been seen of the states that come into truncations."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen | None] = {}

    def see(self, name: str, rows: Tensor, entered: Sequence[Tensor], batch_dim: int) -> None:
        """Take note of which `rows` of a state that has `entered` go on from the end of a chunk."""
        seen = self._seen.setdefault(name, _Seen())
        if seen is None:
            return
        filled = torch.stack([to_rows(t.detach(), batch_dim).flatten(1).any(1) for t in entered]).any(0)
        went_on, strange = rows.any(), (filled & ~rows).any()
        seen.went_on = went_on if seen.went_on is None else seen.went_on | went_on
        seen.strange = strange if seen.strange is None else seen.strange | strange

    def end_step(self, names: Iterable[str]) -> None:
        """Count a step of truncations `names`; now and then look at what was seen, until it is clear."""
        for name in names:
            seen = self._seen.setdefault(name, _Seen())
            if seen is None:
                continue
            seen.steps += 1
            if seen.steps == PATIENCE:
                self._look(name, seen)

    def _look(self, name: str, seen: _Seen) -> None:
        self._seen[name] = None
        if seen.went_on is None or (bool(seen.strange) and not bool(seen.went_on)):
            warnings.warn(
                f"No sequence has gone on at truncation {name!r} in {PATIENCE} training steps, so its "
                "estimator learns nothing but zero: no state came in as it had gone out, with a graph. "
                "Detach outside of the module if at all, hand on all of its tensors as it returned them, "
                "and begin anew in the rows of new sequences only; see docs/recurrent.md.",
                stacklevel=2,
            )
        elif not bool(seen.went_on):  # all of them have ended in their first chunk
            self._seen[name] = _Seen()
