"""What a stage reads of the stages below beside the output of its lower boundary, and who passes it on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.header import MAX_TENSORS

Path = tuple[tuple[str, int], ...]
"""A call, below the calls around it: first names of modules, each with its number in the call around it.

A stage sees nothing of what a module calls that it skips, or that is compiled: so calls are not numbered
throughout a step.
"""


class Frames:
    """The calls in progress."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._open: list[tuple[Path, Counter[str]]] = [((), Counter())]

    def enter(self, module: str) -> Path:
        """Note that a call begins."""
        around, numbers = self._open[-1]
        path = (*around, (module, numbers[module]))
        numbers[module] += 1
        self._open.append((path, Counter()))
        return path

    def leave(self) -> None:
        """Note that the innermost call has ended."""
        self._open.pop()


class Spot(NamedTuple):
    """Where a tensor is in what modules return during one step.

    Attributes:
        path: The call.
        leaf: Number of the value among all in the output.
        structure: How the output was built, in words.
    """

    path: Path
    leaf: int
    structure: str

    @property
    def module(self) -> str:
        """First name of the module."""
        return self.path[-1][0]


@dataclass(frozen=True)
class Bypass:
    """A tensor that some module returns and a later stage reads: it travels with the activations.

    Attributes:
        made: The stage that makes it.
        until: The last stage that reads it.
        with_gradient: Whether it may take a gradient.
        spots: Every place where a module returns it.
        within: The boundaries whose own output it is part of, each with its number among the tensors there.
    """

    made: int
    until: int
    with_gradient: bool
    spots: frozenset[Spot]
    within: frozenset[tuple[int, int]]

    def places_in(self, boundary: int) -> list[int]:
        """Its numbers among the tensors of that boundary's own output, of which it may be several."""
        return sorted(place for number, place in self.within if number == boundary)

    def rides(self, boundary: int) -> bool:
        """Whether it crosses the boundary of that number beside that one's output."""
        return self.made <= boundary < self.until and not self.places_in(boundary)

    def concerns(self, stage: int) -> bool:
        """Whether that stage makes it, reads it or passes it on."""
        return self.made <= stage <= max(self.until, *(boundary + 1 for boundary, _ in self.within), 0)


class Sighting:
    """What a trace has seen of one tensor.

    Args:
        tensor: The tensor; kept, so that its identity stays its own.
        stage: The stage that has made it.
    """

    def __init__(self, tensor: Tensor, stage: int) -> None:
        self._tensor, self._made, self._until = tensor, stage, stage
        self._spots: set[Spot] = set()
        self._within: set[tuple[int, int]] = set()
        self._version, self._changed = version_of(tensor), False

    @property
    def is_old(self) -> bool:
        """Whether the tensor was changed in place since then."""
        return version_of(self._tensor) != self._version

    def returned(self, spot: Spot) -> None:
        """Note that a module returns it."""
        self._spots.add(spot)

    def crossed(self, boundary: int, place: int) -> None:
        """Note that it is part of a boundary's own output."""
        self.read(boundary)
        self._within.add((boundary, place))

    def read(self, stage: int) -> None:
        """Note that code of `stage` reads it, or has changed it in place."""
        self._changed = self._changed or self.is_old
        if all(boundary != stage - 1 for boundary, _ in self._within):
            self._until = max(self._until, stage)

    def bypass(self, with_gradient: bool) -> Bypass | None:
        """How it travels; None where it does not have to, or cannot."""
        requires_grad = self._tensor.requires_grad
        if self._until == self._made or self._changed or (requires_grad and not with_gradient):
            return None
        return Bypass(self._made, self._until, with_gradient, frozenset(self._spots), frozenset(self._within))


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; nothing in inference mode knows that."""
    with torch._C.DisableTorchFunction():  # it is no use of it
        return 0 if tensor.is_inference() else tensor._version


class Sightings:
    """Every tensor that the modules of a traced step have returned."""

    def __init__(self) -> None:
        self._seen: dict[int, Sighting] = {}

    def returned(self, path: Path, stage: int, args: Any, output: Any) -> None:
        """Note what a call has returned, on that stage."""
        given = {id(x) for x in pytree.tree_leaves(args)}
        flat, structure = pytree.tree_flatten(output)
        for leaf, x in enumerate(flat):
            # what was there before and is no module's, such as a tensor of the batch, is there on every stage
            if isinstance(x, Tensor) and (id(x) in self._seen or id(x) not in given):
                if id(x) not in self._seen or self._seen[id(x)].is_old:
                    self._seen[id(x)] = Sighting(x, stage)
                self._seen[id(x)].returned(Spot(path, leaf, repr(structure)))

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


class Held:
    """One tensor that travels, as a stage has it.

    Args:
        tensors: The tensor; several where a boundary's own output has it several times.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensor, self._tensors = tensors[0], tensors
        self._versions = [version_of(x) for x in tensors]

    def is_same(self, value: Any) -> bool:
        """Whether `value` is that tensor."""
        return any(x is value for x in self._tensors)

    @property
    def is_unchanged(self) -> bool:
        """Whether it was not changed in place."""
        return self._versions == [version_of(x) for x in self._tensors]


class Luggage:
    """What travels, as one stage has it.

    Args:
        bypasses: All that travels.
        stage: Number of the stage.
    """

    def __init__(self, bypasses: Sequence[Bypass], stage: int) -> None:
        self._stage = stage
        self._within = [(b, b.places_in(stage - 1)) for b in bypasses]
        self._in = [b for b in bypasses if b.rides(stage - 1)]
        self._out = [b for b in bypasses if b.rides(stage)]
        self._spots: dict[Path, list[tuple[Spot, Bypass]]] = {}
        for bypass in bypasses:
            for spot in bypass.spots if bypass.concerns(stage) else ():
                self._spots.setdefault(spot.path, []).append((spot, bypass))
        self._structures: dict[Path, pytree.TreeSpec] = {}
        self._known: dict[Bypass, Held] = {}
        self.frames = Frames()

    def __bool__(self) -> bool:
        """Whether anything travels from, to or through the stage."""
        return bool(self._spots)

    def begin(self, crossed: Sequence[Tensor], arrived: Sequence[Tensor]) -> None:
        """Take what a run of the stage has been given.

        Args:
            crossed: The tensors of the lower boundary's own output.
            arrived: Those that have come beside it.
        """
        self.frames.begin()
        self._known = {b: Held(x) for b, x in zip(self._in, arrived, strict=True)}
        self._known |= {b: Held(*(crossed[i] for i in places)) for b, places in self._within if places}

    def end(self) -> None:
        """Let go of everything."""
        self._known = {}

    def fill(self, path: Path, output: Any) -> Any:
        """What a call below the lower boundary returns, with what has come in the place of mere shapes."""
        spots = [(s, self._known[b]) for s, b in self._spots.get(path, ()) if b in self._known]
        if not spots:
            return output
        flat, structure = pytree.tree_flatten(output)
        for spot, held in spots:
            if spot.leaf < len(flat) and isinstance(flat[spot.leaf], Tensor):
                flat[spot.leaf] = held.tensor
        return pytree.tree_unflatten(flat, structure)

    def note(self, path: Path, output: Any) -> None:
        """See what a call of this stage's own returns: what it makes is to go on.

        Raises:
            BoundaryError: It takes a gradient, or is not the tensor, which it did or was when traced.
        """
        spots = self._spots.get(path)
        if spots is None:
            return
        flat, structure = pytree.tree_flatten(output)
        if structure != self._structures.get(path):
            _check_structure(*spots[0], structure)
            self._structures[path] = structure
        for spot, bypass in spots:
            tensor, held = flat[spot.leaf], self._known.get(bypass)
            if held is not None:
                _check_same(spot, tensor, held, bypass)
            elif bypass.made == self._stage and isinstance(tensor, Tensor):
                _check_gradient(spot, tensor, bypass)
                self._known[bypass] = Held(tensor)

    def check(self) -> None:
        """See that nothing of it was changed in place.

        Raises:
            BoundaryError: Something was, though not when the model was traced.
        """
        for bypass, held in self._known.items():
            if not held.is_unchanged:
                raise BoundaryError(
                    f"Expected what the modules {_modules(bypass)} return and stage {bypass.until} reads not "
                    f"to be changed in place, as when the model was traced, but stage {self._stage} has "
                    "changed it: a later stage would do so again. Use the form that makes a new tensor."
                )

    def onward(self) -> list[Tensor]:
        """What goes past the upper boundary.

        Raises:
            BoundaryError: One was not made, or was changed in place, though it was not when traced.
        """
        missing = next((b for b in self._out if b not in self._known), None)
        if missing is not None:
            raise BoundaryError(
                f"Expected one of the modules {_modules(missing)} to return, before the boundary of stage "
                f"{self._stage}, what stage {missing.until} reads, as when the model was traced, but none "
                "did. Call it alike in every step, or let the boundary's module return that, too."
            )
        self.check()
        return [self._known[b].tensor for b in self._out]


def check_room(boundary: str, own: int, beside: Sequence[Bypass]) -> None:
    """See that one message takes what goes past a boundary.

    Args:
        boundary: Its name.
        own: Number of the tensors of its own output.
        beside: What goes past it beside those.

    Raises:
        BoundaryError: It does not.
    """
    if own + len(beside) > MAX_TENSORS:
        modules = sorted({name for bypass in beside for name in _modules(bypass)})
        raise BoundaryError(
            f"Expected up to {MAX_TENSORS} tensors to go past boundary {boundary!r}, as a message takes, but "
            f"got {own} of its own and {len(beside)} that modules {modules} return and later stages read. "
            "Return some of them as one tensor, such as by `torch.stack`, or choose another boundary."
        )


def _modules(bypass: Bypass) -> list[str]:
    return sorted({spot.module for spot in bypass.spots})


def _check_structure(spot: Spot, bypass: Bypass, structure: pytree.TreeSpec) -> None:
    if repr(structure) != spot.structure:
        raise BoundaryError(
            f"Expected the output of {spot.module!r}, which stage {bypass.until} reads, to be built as when "
            f"the model was traced, {spot.structure}, but got {structure}. Return the same structure every "
            "time, such as a tensor of zeros in the place of what is missing."
        )


def _check_same(spot: Spot, value: Any, held: Held, bypass: Bypass) -> None:
    if not held.is_same(value):
        raise BoundaryError(
            f"Expected the modules {_modules(bypass)} to return one and the same tensor, which stage "
            f"{bypass.until} reads, as when the model was traced, but {spot.module!r} has returned another "
            "one. Return what was given in every step or in none, e.g. by `clone()`."
        )


def _check_gradient(spot: Spot, tensor: Tensor, bypass: Bypass) -> None:
    if tensor.requires_grad and not bypass.with_gradient:
        raise BoundaryError(
            f"Expected the output of {spot.module!r}, which stage {bypass.until} reads, to take no gradient, "
            "as when the model was traced, but it does now: a skip connection past the boundary. Keep "
            "frozen what was frozen, or choose a boundary behind which nothing reads it."
        )
