"""The norm over all stages' gradients: it travels along with the messages, and is known some updates later.

Activations carry up what the stages below have found in the update before; the last stage adds its own, and
target gradients carry the whole down again. Nobody waits for it. That of update t is used in update t + lag,
on every stage, however fast they are.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_dni.pipeline.message import Kind


class LaggedNorm:
    """What one stage knows of the norm over all stages.

    Args:
        stage: Number of this stage.
        stages: Number of all stages.
        staleness: Number of updates after which a message from above is read.

    Attributes:
        lag: Updates after which the norm is used: the longest way up and down again.
    """

    def __init__(self, stage: int, stages: int, staleness: int) -> None:
        self._is_last = stage == stages - 1
        self._unheard = None if stage else 0.0
        self.lag = 1 + (stages - 1) * (staleness + 1)
        self._update = 0
        self._own: Tensor | float | None = None
        self._below: float | None = self._unheard
        self._totals: dict[int, float] = {}
        self._unsent: deque[int] = deque()

    def pass_on(self, squared: Tensor) -> float | None:
        """Take note of this stage's squared norm in this update; the square over all stages `lag` ago.

        Args:
            squared: Read only in the next update, when the device has computed it.

        Returns:
            None in the first `lag` updates.
        """
        if self._is_last:
            self._conclude()
        due = self._totals.pop(self._update - self.lag, None)
        self._own, self._below, self._update = squared, self._unheard, self._update + 1
        return due

    def _so_far(self) -> float | None:
        """What this stage and those below have found in the update before; None where that is not known."""
        if self._own is None or self._below is None:
            return None
        return self._below + float(self._own)

    def _conclude(self) -> None:
        """On the last stage that is the whole."""
        total, update = self._so_far(), self._update - 1
        if total is not None and update not in self._totals:
            self._learn(update, total)

    def _learn(self, update: int, total: float) -> None:
        self._totals[update] = total
        self._unsent.append(update)

    def tell(self, kind: Kind, upwards: bool) -> tuple[float, ...]:
        """What to send with a message of any kind."""
        if upwards:
            found = self._so_far()
            return () if found is None else (found,)
        if self._is_last:
            self._conclude()
        told = tuple(fact for u in self._unsent for fact in (float(u), self._totals[u]))
        self._unsent.clear()
        return told

    def hear(self, said: tuple[float, ...], upwards: bool) -> None:
        """Take note of what came with a message."""
        if upwards:
            self._below = said[0] if said else self._unheard
            return
        for update, total in zip(said[::2], said[1::2], strict=True):
            self._learn(int(update), total)

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart of a stage to which nothing is under way."""
        return {
            "update": self._update,
            "own": None if self._own is None else float(self._own),
            "below": self._below,
            "totals": [list(pair) for pair in sorted(self._totals.items())],
            "unsent": list(self._unsent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._update, self._own, self._below = state["update"], state["own"], state["below"]
        self._totals = {int(update): float(total) for update, total in state["totals"]}
        self._unsent = deque(state["unsent"])
