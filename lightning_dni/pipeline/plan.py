"""Which stage owns what, and what crosses between them: what one traced forward pass has shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import COMPILED
from lightning_dni.core.value import close_value, open_value
from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.bypass import Bypass


@dataclass(frozen=True)
class Leaf:
    """One tensor of a value, as it was when traced."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Crossing:
    """What a module returned when it was traced: its structure, a `Leaf` per tensor, the rest as it was.

    Attributes:
        name: The module's name.
        structure: How the flat values belong together.
        flat: A `Leaf` in the place of every tensor; whatever else was in the value stays.
    """

    name: str
    structure: pytree.TreeSpec
    flat: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, value: Any) -> "Crossing":
        """Describe `value`, which module `name` returned.

        Raises:
            BoundaryError: It cannot be opened into dense tensors.
        """
        flat, structure = open_value(name, value)
        _refuse_nested(name, flat)
        facts = [Leaf(tuple(x.shape), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in flat]
        return cls(name, structure, tuple(facts))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The tensors, in the order in which they cross."""
        return tuple(x for x in self.flat if isinstance(x, Leaf))

    def pack(self, value: Any) -> tuple[Tensor, ...]:
        """The tensors of `value`, in order; only they need to cross.

        Raises:
            BoundaryError: `value` is not built as the traced one was.
        """
        flat, structure = open_value(self.name, value)
        _refuse_nested(self.name, flat)
        same = structure == self.structure and all(
            isinstance(x, Tensor) if isinstance(fact, Leaf) else type(x) is type(fact) and x == fact
            for x, fact in zip(flat, self.flat, strict=True)
        )
        if not same:
            raise BoundaryError(
                f"Expected the output of boundary {self.name!r} to be built as when it was traced, "
                f"{self._text(self.flat)}, but got {self._text(flat)}. Only tensors cross: return what "
                "changes from batch to batch as a tensor, and the same structure every time."
            )
        return tuple(x for x in flat if isinstance(x, Tensor))

    def unpack(self, tensors: Sequence[Tensor]) -> Any:
        """Undo `pack`.

        Raises:
            BoundaryError: There are more or fewer tensors than were traced.
        """
        if len(tensors) != len(self.leaves):
            raise BoundaryError(
                f"Expected {len(self.leaves)} tensors at boundary {self.name!r}, but got {len(tensors)}. "
                "Pass on what `pack` gave."
            )
        rest = iter(tensors)
        return close_value([next(rest) if isinstance(x, Leaf) else x for x in self.flat], self.structure)

    def _text(self, flat: Sequence[Any]) -> str:
        return f"({', '.join('tensor' if isinstance(x, Tensor | Leaf) else repr(x) for x in flat)})"


def _refuse_nested(name: str, flat: Sequence[Any]) -> None:
    if any(isinstance(x, Tensor) and x.is_nested for x in flat):
        raise BoundaryError(
            f"Expected dense tensors at boundary {name!r}, but got a nested one. nn.TransformerEncoder makes "
            "them of padded batches in evaluation: give it enable_nested_tensor=False, or choose a boundary "
            "outside of it."
        )


@dataclass(frozen=True)
class TracedCall:
    """One call of a module: the stages in which it began and ended, the rows that it saw, what it gave."""

    entry: int
    exit: int
    rows: int | None
    output: Crossing | None


@dataclass(frozen=True)
class StagePlan:
    """How a model falls into stages. Names are those of the model before torch.compile wrapped any of it.

    Attributes:
        boundaries: In the order in which they ran; stage k ends with the k-th.
        tensors: Stage that owns a parameter or buffer, by each of its names.
        shared: Buffers that no forward pass changes and that code of several stages may read.
        modules: The stages in which a module runs, by each of its names; none where it has nothing to run.
        calls: What was seen of every module that ran, by each of its names.
        crossing: What crossed each boundary.
        bypasses: What later stages read beside that, and which travels with it.
        elements_per_row: Elements of the network's output per row, where it was seen.
    """

    boundaries: tuple[str, ...]
    tensors: Mapping[str, int]
    shared: frozenset[str]
    modules: Mapping[str, frozenset[int]]
    calls: Mapping[str, tuple[TracedCall, ...]] = field(repr=False)
    crossing: Mapping[str, Crossing] = field(repr=False)
    bypasses: tuple[Bypass, ...] = ()
    elements_per_row: int | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.boundaries) + 1

    def check(self, stage: int) -> None:
        """See that there is such a stage.

        Raises:
            StageError: There is none.
        """
        if not 0 <= stage < self.stages:
            raise StageError(
                f"Expected `stage` in [0, {self.stages}) for boundaries {list(self.boundaries)}, but got "
                f"{stage}. There is one stage more than boundaries."
            )

    def owner(self, name: str) -> int:
        """The stage that owns parameter or buffer `name`, in which torch.compile's wrappers may occur."""
        return self.tensors[without_wrappers(name)]

    def saves(self, stage: int, name: str) -> bool:
        """Whether `stage` writes `name` into a checkpoint: its own, and what is of no stage."""
        return self.tensors.get(without_wrappers(name), stage) == stage

    def holds(self, stage: int, name: str) -> bool:
        """Whether `stage` reads the values of parameter or buffer `name`: its own ones, and the shared."""
        name = without_wrappers(name)
        return self.tensors[name] == stage or name in self.shared

    def runs(self, stage: int, module: str) -> bool:
        """Whether `module` may run on `stage`."""
        return not self.modules[module] or stage in self.modules[module]

    def skipped(self, stage: int) -> list[str]:
        """The largest modules that belong wholly to other stages, and so do not run on `stage`."""
        self.check(stage)
        foreign: list[str] = []
        for name in self.modules:
            if not self.runs(stage, name) and not any(name.startswith(f"{f}.") for f in foreign):
                foreign.append(name)
        return foreign


def without_wrappers(name: str) -> str:
    """A tensor's or module's name in the model before torch.compile wrapped any of it."""
    return ".".join(level for level in name.split(".") if level != COMPILED)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model`, by each name that it has without torch.compile."""
    parameters = model.named_parameters(remove_duplicate=False)
    named = [*parameters, *model.named_buffers(remove_duplicate=False)]
    return {without_wrappers(name): tensor for name, tensor in named}
