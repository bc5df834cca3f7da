"""Which gradients are sent together and in which order: the same on every process, whatever each one does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dni.errors import StageError

AT_THE_END = 1 << 30
"""Group of what is only sent once everything else is there."""


class Sighting(NamedTuple):
    """What one process has seen of one parameter in a step.

    Attributes:
        shape: Of the parameter.
        dtype: Of the parameter, by name.
        present: Whether it has a gradient.
        sparse: Whether that is a sparse one.
        group: Which group of offers completed it.
        order: Its place among all offers.
    """

    shape: tuple[int, ...]
    dtype: str
    present: bool
    sparse: bool
    group: int
    order: int


class Plan(NamedTuple):
    """Names of parameters by bucket, in the order in which buckets are sent, then of the sparse ones."""

    buckets: list[list[str]]
    sparse: list[str]

    @property
    def names(self) -> list[str]:
        """All of them, in that order."""
        return [name for names in [*self.buckets, self.sparse] for name in names]


@dataclass(eq=False, slots=True)
class Slot:
    """One parameter in the exchange.

    Attributes:
        variable: The parameter.
        bucket: Number of its bucket; None while it has none.
        view: Its place there.
        expected: How many offers complete its gradient; 0: the loss does; None: only the end of the step.
        suspect: Whether it was sent too early once: from then on it waits for the end.
        offers: Offers in this step.
        by_loss: Whether the loss reached it directly in this step.
        group: The group of its last offer in this step.
        order: The place of its last offer in this step.
        base: What `.grad` held when it was sent.
        version: The version of that tensor then.
    """

    variable: Tensor
    bucket: int | None = None
    view: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: int | None = None
    suspect: bool = False
    offers: int = 0
    by_loss: bool = False
    group: int = AT_THE_END
    order: int = 0
    base: Tensor | None = None
    version: int = 0

    def reset(self) -> None:
        """Forget the last step."""
        self.offers, self.by_loss, self.group, self.order = 0, False, AT_THE_END, 0
        self.base = None

    def remember_base(self, grad: Tensor | None) -> None:
        """Note what `.grad` holds, to see later whether it was left alone."""
        self.base, self.version = grad, 0 if grad is None else grad._version

    def base_is_unchanged(self) -> bool:
        """Whether `.grad` is what it was when the gradient was sent."""
        grad = self.variable.grad
        return grad is self.base and (grad is None or grad._version == self.version)

    def completed_by(self, counted: int) -> int | None:
        """How many offers would have completed it in this step; None: that was only clear at its end."""
        if self.suspect or counted != self.offers or (self.by_loss and self.offers):
            return None
        return 0 if self.by_loss else self.offers or None

    def was_sent_right(self, counted: int) -> bool:
        """Whether what was sent is all that there is, given how many offers `counted`."""
        return counted == self.offers == self.expected and self.base_is_unchanged()


def agree(sightings: Sequence[Mapping[str, Sighting]], planned: Sequence[str], cap: int) -> Plan:
    """The plan that follows from what all processes have seen; it is the same wherever it is made.

    Args:
        sightings: What each process has seen, by parameter name.
        planned: Names that were in the plan before; they stay in it.
        cap: Bytes at which a bucket is full.

    Raises:
        StageError: A process does not have a parameter that another one has a gradient for.
    """
    names = [name for seen in sightings for name, s in seen.items() if s.present]
    names = list(dict.fromkeys([*names, *planned]))
    for name in names:
        found = {(seen[name].shape, seen[name].dtype) if name in seen else None for seen in sightings}
        if len(found) > 1:
            raise StageError(
                f"Expected parameter {name!r} to be the same in every process, but got (shape, dtype) "
                f"{sorted(map(str, found))}. Build the same model on every rank, with every boundary in use."
            )
    sparse = [n for n in names if all(s[n].sparse for s in sightings if s[n].present)]
    sparse = [n for n in sparse if any(s[n].present for s in sightings)]
    places = {n: _place(n, sightings) for n in names if n not in sparse}
    buckets: list[list[str]] = []
    kind: tuple[int, int, str] | None = None
    room = 0
    for name in sorted(places, key=lambda n: places[n]):
        facts = sightings[0][name]
        size = torch.Size(facts.shape).numel() * getattr(torch, facts.dtype).itemsize
        if places[name][:3] != kind or room < size:
            buckets.append([])
            kind, room = places[name][:3], cap
        buckets[-1].append(name)
        room -= size
    return Plan(buckets, sparse)


def _place(name: str, sightings: Sequence[Mapping[str, Sighting]]) -> tuple[int, int, str, int]:
    """Sort key: where the first process that has a gradient met it, at the end if any met it only there."""
    seen = [(rank, s[name]) for rank, s in enumerate(sightings) if s[name].present]
    if not seen or any(s.group == AT_THE_END for _, s in seen):
        return len(sightings), AT_THE_END, sightings[0][name].dtype, 0
    rank, first = seen[0]
    return rank, first.group, first.dtype, first.order
