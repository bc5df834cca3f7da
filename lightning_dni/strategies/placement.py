"""Which process is which stage, and which part of the user's module belongs to it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils import _pytree as pytree

from lightning_dni.pipeline.balance import Measured
from lightning_dni.pipeline.passage import fingerprint
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.timing import measure
from lightning_dni.pipeline.tracing import trace_stages
from lightning_dni.strategies._compat import (
    MisconfigurationException,
    Precision,
    move_data_to_device,
    prepared,
    quiet_copy,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a process stands: the last stage is global rank 0, so loggers and progress bars see its loss.

    Attributes:
        stage: Number of the stage of this process.
        copy: Number of the copy of the pipeline to which it belongs.
        ranks: Global rank of each stage of each copy of the pipeline, as `ranks[stage][copy]`.
    """

    stage: int
    copy: int
    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rank: int, world_size: int, boundaries: Sequence[str]) -> "Place":
        """The place of process `rank`.

        Raises:
            MisconfigurationException: There are not as many processes for every stage.
        """
        stages = len(boundaries) + 1
        if world_size % stages:
            raise MisconfigurationException(
                f"Expected {stages} processes or a multiple of it, one per stage of boundaries "
                f"{list(boundaries)}, but got {world_size}. Set `devices` and `num_nodes` of the Trainer."
            )
        return cls.of_stages(rank, world_size, stages)

    @classmethod
    def of_stages(cls, rank: int, world_size: int, stages: int) -> "Place":
        """The place of process `rank` where `stages` divides their number."""
        copies = world_size // stages
        ranks = [tuple(range(k * copies, (k + 1) * copies)) for k in reversed(range(stages))]
        return cls(stages - 1 - rank // copies, rank % copies, tuple(ranks))

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage == len(self.ranks) - 1

    @property
    def copies(self) -> int:
        """Number of copies of the whole pipeline, which share every batch among them."""
        return len(self.ranks[0])

    @property
    def firsts(self) -> list[int]:
        """Global rank of each stage in the first copy."""
        return [ranks[0] for ranks in self.ranks]

    def downwards(self, found: Sequence[T], copy: int = 0) -> list[T]:
        """What the stages of a copy have said, the last stage first."""
        return [found[ranks[copy]] for ranks in reversed(self.ranks)]

    def of_others(self, found: Sequence[T]) -> list[list[T]]:
        """The same of every copy but the first."""
        return [self.downwards(found, copy) for copy in range(1, self.copies)]

    @property
    def names(self) -> list[str]:
        """What each process is called, by its global rank."""
        stage_of = {rank: stage for stage, ranks in enumerate(self.ranks) for rank in ranks}
        return [f"Stage {stage_of[rank]}" for rank in sorted(stage_of)]


class Trial:
    """One run of a step of the user's on a copy of the module, of which nothing is seen outside.

    Args:
        module: The module; it is copied.
        step: Name of the step.
        args: What the step is given.
        precision: The Trainer's precision plugin.
        device: Where it runs; None: the CPU, on which stages can be compared with the whole bit for bit.
        copies: Number of copies of the pipeline, of each of which a step can ask for its tensors.

    Attributes:
        args: What the step is given, where it runs.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        step: str,
        args: Sequence[Any],
        precision: Precision,
        device: torch.device | None = None,
        copies: int = 1,
    ) -> None:
        device = device or torch.device("cpu")
        self._step, self._precision, self._device = step, precision, device
        self._logged: list[torch.Tensor] = []
        with torch.inference_mode(False):  # else the copies could not be changed outside of it
            self._copy = quiet_copy(module, self._hear, copies).to(device)
            self.args: tuple[Any, ...] = move_data_to_device(tuple(args), device)

    def take(self, batch: Any, first_part: Callable[[Sequence[Any]], tuple[Any, ...]]) -> None:
        """Give the step what a loop makes of a loader's batch, or the part of it that runs at a time."""
        args: tuple[Any, ...] = (prepared(self._copy, batch, self._precision), 0)
        try:
            signature(getattr(self._copy, self._step)).bind(*args)
        except TypeError:
            args = args[:1]
        self.args = first_part(args)

    @property
    def _trains(self) -> bool:
        return self._step == "training_step"

    def _run(self) -> Any:
        contexts: dict[str, Callable[[], Any]] = {
            "training_step": self._precision.train_step_context,
            "validation_step": self._precision.val_step_context,
            "test_step": self._precision.test_step_context,
            "predict_step": self._precision.predict_step_context,
        }
        self._logged = []
        with contexts[self._step](), self._autocast():
            result = getattr(self._copy, self._step)(*self.args)
        return result if self._trains else (result, self._logged)

    def _hear(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the numbers that the step logs, which may be all that an evaluation gives."""
        values = pytree.tree_leaves((args, kwargs))
        self._logged += [torch.as_tensor(x) for x in values if isinstance(x, (float, torch.Tensor))]

    def _autocast(self) -> Any:
        """Mixed precision where the step runs here, which may not be where the plugin's does."""
        plugin = self._precision
        if not isinstance(plugin, MixedPrecision) or plugin.device == self._device.type:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def measure(self) -> Measured:
        """Measure the forward pass, and see where it can be cut.

        Raises:
            BoundaryError: The step returns no loss.
        """
        return measure(self._copy, self._run)

    def plan(self, boundaries: Sequence[str], output: str | None, skips: bool = False) -> StagePlan:
        """See what belongs to which stage, and that the stages together do what the whole module does.

        Args:
            boundaries: Their names.
            output: Name of the module whose output is the network's.
            skips: Whether skip connections may pass boundaries, as they may where gradients are exact.

        Raises:
            BoundaryError: The module cannot be cut there.
            StageError: A parameter is used in two stages, or the stages do something else.
        """
        plan = trace_stages(self._copy, boundaries, self._run, grad=self._trains, output=output, skips=skips)
        with torch.set_grad_enabled(self._trains):
            check_split(self._copy, plan, self._run)
        return plan


def compare_plans(plan: StagePlan, batch: Any, moved: int, place: Place) -> None:
    """See that every process has found the same stages, and those of one copy from the same batch.

    `moved` is the fingerprint of what the batch was before it was moved to a device.

    Raises:
        MisconfigurationException: On every process, where one differs.
    """
    here = (plan.boundaries, (sorted(plan.tensors.items()), plan.bypasses), fingerprint(batch, moved))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    strange = [rank for k in range(place.copies) for rank in _strange(found, [r[k] for r in place.ranks])]
    if strange:
        raise MisconfigurationException(
            f"Expected all stages to read the same first batch, but got other ones on ranks {strange} than "
            "on their last stage. Use one seed (`seed_everything`) on all processes, and leave the sampler "
            "to the Trainer (use_distributed_sampler=True)."
        )
    if any(other[:2] != found[0][:2] for other in found):
        raise MisconfigurationException(
            f"Expected every process to find the same stages, but got {[list(other[0]) for other in found]}. "
            "Build the same module and boundaries on every rank."
        )


def _strange(found: Sequence[Any], ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` whose batch is not that of their last stage."""
    return [rank for rank in ranks if found[rank][2] != found[ranks[-1]][2]]


def own_tensors(module: nn.Module, plan: StagePlan, stage: int) -> list[torch.Tensor]:
    """Parameters and buffers of a stage."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [tensor for name, tensor in named if plan.owner(name) == stage]
