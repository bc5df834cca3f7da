"""What a stage reads of the stages below beside the output of its lower boundary, and who passes it on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.errors import BoundaryError


class Spot(NamedTuple):
    """Where a tensor is in what modules return during one step.

    Attributes:
        module: First name of the module.
        call: Number of its call.
        leaf: Number of the value among all in the output.
    """

    module: str
    call: int
    leaf: int


@dataclass(frozen=True)
class Bypass:
    """A tensor that some module returns and a later stage reads: it travels with the activations.

    Attributes:
        made: The stage that makes it.
        until: The last stage that reads it.
        requires_grad: Whether it took a gradient when it was traced.
        spots: Every place where a module returns it.
        within: The boundaries whose own output it is part of, each with its number among the tensors there.
    """

    made: int
    until: int
    requires_grad: bool
    spots: frozenset[Spot]
    within: frozenset[tuple[int, int]]

    def place_in(self, boundary: int) -> int | None:
        """Its number among the tensors of that boundary's own output, None where it is none of them."""
        return dict(self.within).get(boundary)

    def rides(self, boundary: int) -> bool:
        """Whether it crosses the boundary of that number beside that one's output."""
        return self.made <= boundary < self.until and self.place_in(boundary) is None


class Sighting:
    """What a trace has seen of one tensor.

    Args:
        tensor: The tensor; kept, so that its identity stays its own.
        stage: The stage that has made it.
    """

    def __init__(self, tensor: Tensor, stage: int) -> None:
        self._tensor, self._made, self._until = tensor, stage, stage
        self._spots: set[Spot] = set()
        self._within: dict[int, int] = {}
        self._version, self._changed = _version(tensor), False

    def returned(self, spot: Spot) -> None:
        """Note that a module returns it as it is now: what was returned before a change does not count."""
        if _version(self._tensor) != self._version:
            self._version, self._changed = _version(self._tensor), False
            self._spots.clear()
        self._spots.add(spot)

    def crossed(self, boundary: int, place: int) -> None:
        """Note that it is part of a boundary's own output."""
        self.read(boundary)
        self._within[boundary] = place

    def read(self, stage: int) -> None:
        """Note that code of `stage` reads it, or has changed it in place."""
        self._changed = self._changed or _version(self._tensor) != self._version
        if stage - 1 not in self._within:
            self._until = max(self._until, stage)

    def bypass(self, with_gradient: bool) -> Bypass | None:
        """How it travels; None where it does not have to, or cannot."""
        requires_grad = self._tensor.requires_grad
        if self._until == self._made or self._changed or (requires_grad and not with_gradient):
            return None
        within = frozenset(self._within.items())
        return Bypass(self._made, self._until, requires_grad, frozenset(self._spots), within)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Sightings:
    """Every tensor that the modules of a traced step have returned."""

    def __init__(self) -> None:
        self._seen: dict[int, Sighting] = {}

    def returned(self, module: str, call: int, stage: int, args: Any, output: Any) -> None:
        """Note what a module has returned, on that stage."""
        given = {id(x) for x in pytree.tree_leaves(args)}
        for leaf, x in enumerate(pytree.tree_leaves(output)):
            # what was there before and is no module's, such as a tensor of the batch, is there on every stage
            if isinstance(x, Tensor) and (id(x) in self._seen or id(x) not in given):
                self._seen.setdefault(id(x), Sighting(x, stage)).returned(Spot(module, call, leaf))

    def crossed(self, boundary: int, tensors: Sequence[Tensor]) -> None:
        """Note what is part of a boundary's own output."""
        for place, tensor in enumerate(tensors):
            if id(tensor) in self._seen:
                self._seen[id(tensor)].crossed(boundary, place)

    def read(self, tensor: Tensor, stage: int) -> None:
        """Note that code of `stage` reads a tensor."""
        if id(tensor) in self._seen:
            self._seen[id(tensor)].read(stage)

    def bypasses(self, with_gradients: bool) -> tuple[Bypass, ...]:
        """Those that travel, in the order in which they were made.

        Args:
            with_gradients: Whether those that take a gradient do.
        """
        found = [seen.bypass(with_gradients) for seen in self._seen.values()]
        return tuple(each for each in found if each is not None)


class Luggage:
    """What travels, as one stage has it.

    Args:
        bypasses: All that travels.
        stage: Number of the stage.
    """

    def __init__(self, bypasses: Sequence[Bypass], stage: int) -> None:
        self._stage = stage
        self._within = [(b, b.place_in(stage - 1)) for b in bypasses]
        self._in = [b for b in bypasses if b.rides(stage - 1)]
        self._out = [b for b in bypasses if b.rides(stage)]
        self._spots: dict[tuple[str, int], list[tuple[int, Bypass]]] = {}
        for bypass in bypasses:
            for module, call, leaf in bypass.spots:
                self._spots.setdefault((module, call), []).append((leaf, bypass))
        self.modules = frozenset(module for module, _ in self._spots)
        self._known: dict[Bypass, Tensor] = {}
        self._calls: Counter[str] = Counter()

    def begin(self, crossed: Sequence[Tensor], arrived: Sequence[Tensor]) -> None:
        """Take what a run of the stage has been given.

        Args:
            crossed: The tensors of the lower boundary's own output.
            arrived: Those that have come beside it.
        """
        self._calls.clear()
        self._known = dict(zip(self._in, arrived, strict=True))
        self._known |= {b: crossed[place] for b, place in self._within if place is not None}

    def end(self) -> None:
        """Let go of everything."""
        self._known = {}

    def pass_through(self, module: str, output: Any) -> Any:
        """What one call of a module returns, with the values that are known in the place of mere shapes.

        What this stage makes itself is noted.

        Raises:
            BoundaryError: It takes a gradient, which it did not when it was traced.
        """
        spots = self._spots.get((module, self._calls[module]), ())
        self._calls[module] += 1
        if not spots:
            return output
        flat, structure = pytree.tree_flatten(output)
        for leaf, bypass in spots:
            if leaf >= len(flat) or not isinstance(flat[leaf], Tensor):
                continue
            if bypass.made < self._stage:
                flat[leaf] = self._known.get(bypass, flat[leaf])
            elif bypass.made == self._stage:
                _check_gradient(module, flat[leaf], bypass)
                self._known[bypass] = flat[leaf]
        return pytree.tree_unflatten(flat, structure)

    def onward(self) -> list[Tensor]:
        """What goes past the upper boundary.

        Raises:
            BoundaryError: One was not made, though it was when traced.
        """
        missing = next((b for b in self._out if b not in self._known), None)
        if missing is not None:
            names = sorted({spot.module for spot in missing.spots})
            raise BoundaryError(
                f"Expected one of the modules {names} to return, before the boundary of stage "
                f"{self._stage}, what stage {missing.until} reads, as when the model was traced, but none "
                "did. Call it alike in every step, or let the boundary's module return that, too."
            )
        return [self._known[b] for b in self._out]


def _check_gradient(module: str, tensor: Tensor, bypass: Bypass) -> None:
    if tensor.requires_grad and not bypass.requires_grad:
        raise BoundaryError(
            f"Expected the output of {module!r}, which stage {bypass.until} reads, to take no gradient, "
            "as when the model was traced, but it does now: a skip connection past the boundary. Keep "
            "frozen what was frozen, or choose a boundary behind which nothing reads it."
        )
