"""Which crossing a boundary tensor belongs to, in this step and in earlier ones."""

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lightning_dni.core.cut import Cut
from lightning_dni.errors import BoundaryError

Past = dict[int, tuple[TensorWeakRef, str]]
"""Boundary tensors by id, with the boundary that each belongs to."""


class Owners:
    """The crossings of a step by boundary tensor, none of which is kept alive.

    Args:
        past: The boundary tensors of earlier steps that somebody still holds.
    """

    def __init__(self, past: Past) -> None:
        self._past = {key: entry for key, entry in past.items() if entry[0]() is not None}
        self._here: dict[int, tuple[TensorWeakRef, Cut]] = {}

    def add(self, crossing: Cut) -> None:
        """Take note of what `crossing` passes on."""
        for leaf in crossing.leaves:
            self._here[id(leaf)] = (TensorWeakRef(leaf), crossing)

    def __call__(self, leaf: Tensor) -> Cut | None:
        """The crossing to which `leaf` belongs, None for any other leaf tensor.

        Raises:
            BoundaryError: It belongs to an earlier step.
        """
        entry = self._here.get(id(leaf))
        if entry is not None and entry[0]() is leaf:
            return entry[1]
        past = self._past.get(id(leaf))
        if past is not None and past[0]() is leaf:
            raise BoundaryError(
                f"Expected a graph of this step, but got one that was kept from an earlier step and ends at "
                f"boundary {past[1]!r}, whose stage is closed. Detach what is kept from one step to the next."
            )
        return None

    def held(self) -> Past:
        """The boundary tensors of this step and of earlier ones, for the next step to look after."""
        return self._past | {key: (ref, cut.boundary) for key, (ref, cut) in self._here.items()}
