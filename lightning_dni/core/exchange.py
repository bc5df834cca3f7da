"""How the engine's replicas in several processes exchange gradients: the face that the engine calls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Gradients = Iterable[tuple[Tensor, Tensor]]
Named = Callable[[], Mapping[str, Tensor]]
"""All parameters that replicas share, by a name that is the same for each of them."""


@runtime_checkable
class Exchange(Protocol):
    """Averages gradients over the replicas, each bucket as soon as it is complete.

    The calls of one exchanged step are `begin`, then `offer`, `offer_accumulated` and `end_group` in any
    order and number, then `merge`.
    """

    def begin(self, fresh: bool) -> None:
        """A step begins whose gradients are exchanged.

        Args:
            fresh: Nothing that `.grad` holds now will be left when gradients are merged.
        """

    def offer(self, gradients: Gradients) -> None:
        """These are there, and will be merged if their forward pass counts: they may be sent already."""

    def offer_accumulated(self, variables: Iterable[Tensor]) -> None:
        """The loss was differentiated: `.grad` of these variables has what it adds."""

    def end_group(self) -> None:
        """What was offered since the last call belongs together; what follows comes clearly later."""

    def merge(self, gradients: Sequence[tuple[Tensor, Tensor]], named: Named) -> None:
        """Add the gradients that count to `.grad`, then average every `.grad` over the replicas.

        A `.grad` that no replica has stays None; one that only some have counts as zero elsewhere.

        Raises:
            StageError: The replicas do not have the same parameters.
        """

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Average `.grad` of these parameters, which every replica gives in the same order."""

    def agree(self, yes: bool) -> bool:
        """Whether every replica says yes."""
