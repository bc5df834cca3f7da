"""What the processes of a pipeline do together: decide, bring the whole module together, save it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.pipeline.exact import ExactEngine
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.norms import LaggedNorm
from lightning_dni.pipeline.residence import bring_state
from lightning_dni.strategies.alarm import Alarm
from lightning_dni.strategies.copies import Copies
from lightning_dni.strategies.decoupled import DecoupledTraining
from lightning_dni.strategies.exact import ExactSchedule
from lightning_dni.strategies.gathering import (
    collect_module,
    gather,
    join_engine_states,
    join_optimizer_states,
    own_optimizer_state,
    share_module,
    under_way,
)
from lightning_dni.strategies.part import PartOnDevice
from lightning_dni.strategies.placement import Place, own_tensors
from lightning_dni.strategies.sharding import (
    CHECKPOINT_KEY,
    join_outlines,
    refuse_remote,
    split_off,
    write_shards,
)

T = TypeVar("T")


class StagesInCommon(DecoupledTraining, PartOnDevice):
    """A strategy whose processes are stages, as far as they act in common.

    Args:
        options: As in `DecoupledTraining`.
        exact: The exact schedule; None for synthetic gradients.
        save_sharded: As in `DNIPipelineStrategy`.
        base: What DDPStrategy takes.
    """

    def __init__(
        self, options: Mapping[str, Any], exact: ExactSchedule | None, save_sharded: bool, **base: Any
    ) -> None:
        super().__init__(options, **base)
        self._exact, self._sharded = exact, save_sharded
        self._place: Place | None = None
        self._links: Links | None = None
        self._copies: Copies | None = None
        self._alarm: Alarm | None = None
        self._norm: LaggedNorm | None = None

    @property
    @override
    def engine(self) -> StageEngine | ExactEngine:
        """The engine of this process's stage."""
        engine = super().engine
        assert isinstance(engine, StageEngine | ExactEngine)
        return engine

    # ---- what must not cross stages, and what must

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce logged values over the copies of the last stage: no other has any."""
        if self._copies is None or not self._placed().is_last:
            return tensor
        return super().reduce(tensor, self._copies.group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the copies of this stage; where there is one, nothing, as in one process.

        Code behind the first boundary calls this on some of the stages only, so it cannot wait for all.
        """
        if self._copies is None:
            return tensor
        everybody = group is None or group is dist.group.WORLD
        return super().all_gather(tensor, self._copies.group if everybody else group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What all stages say, or any of them."""
        said = torch.tensor(int(not decision if all else decision), device=self.root_device)
        self._together(partial(dist.all_reduce, said, op=dist.ReduceOp.MAX), "a decision")
        return bool(said) is not all

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all stages, unless one has stopped."""
        self._together(partial(super().barrier, *args, **kwargs), "a barrier")

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        """Tell all stages, unless one has stopped."""
        return self._together(partial(super().broadcast, obj, src), "a broadcast")

    def _together(self, collective: Callable[[], T], what: str) -> T:
        """What `collective` returns, to which every process has to come; it is left where one has stopped."""
        if self._links is not None:
            self.engine.meet(what)
        return collective() if self._alarm is None else self._alarm.call(collective)

    def _note(self, what: str, args: tuple[Any, ...] = ()) -> None:
        """Have the other stages know where this one is, should it stop."""
        if self._alarm is not None:
            self._alarm.note(what, *args[1:2])

    # ---- the whole module, and what is saved

    def _share_module(self) -> None:
        """Give this process's module what the other stages have learnt; with shards rank 0's alone."""
        plan, module, place = self.engine.plan, self.lightning_module, self._placed()
        if plan is None:
            return
        assert module is not None
        if self._sharded:
            share = partial(collect_module, module, plan, place.stage, place.copy == 0, self.root_device)
        else:
            share = partial(share_module, module, plan, place.firsts)
        self._together(share, "sharing weights")

    @override
    def on_train_end(self) -> None:
        """End with the whole trained module in every process; with shards in rank 0 alone."""
        super().on_train_end()
        self.engine.drain()  # the links close, and another fit may follow
        self._share_module()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state, or this stage's part of a shard; every process calls it."""
        self._note("saving a checkpoint")
        plan = self.engine.plan
        if not self._sharded:
            self._share_module()
        state = super().lightning_module_state_dict()
        if not self._sharded or plan is None:
            return state
        stage = self._placed().stage
        return {name: value for name, value in state.items() if plan.saves(stage, name)}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state over the whole module on rank 0, this stage's elsewhere; every process calls it."""
        state = super().optimizer_state(optimizer)
        if self._sharded:
            return state
        found = self._together(partial(gather, state, self.root_device), "saving an optimizer")
        return state if found is None else join_optimizer_states(self._placed().downwards(found))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state over the whole module, and keep this stage's part."""
        super().load_optimizer_state_dict(checkpoint)
        self._drop_foreign_state()

    def _drop_foreign_state(self) -> None:
        plan = self.engine.plan
        if plan is None:
            return
        assert self.lightning_module is not None
        own = own_tensors(self.lightning_module, plan, self._placed().stage)
        for optimizer in self.optimizers:
            own_optimizer_state(optimizer, own)
            bring_state(optimizer)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module; an exact schedule has no use for estimators."""
        super().load_model_state_dict(checkpoint, strict)
        if self._exact is not None:
            self._restored, self._resumes = None, False

    @override
    def _engine_state(self) -> dict[str, Any] | None:
        engine = self.engine
        if isinstance(engine, ExactEngine):
            return None
        engine.drain()
        state = engine.state_dict()
        if engine.waits_for_part:
            return state
        if self._norm is not None:
            state["pipeline"]["norms"] = {str(self._placed().stage): self._norm.state_dict()}
        if self._sharded:
            return state
        place = self._placed()
        said = under_way(state) if place.copy else state
        found = self._together(partial(gather, said, self.root_device), "saving estimators")
        if found is None:
            return state
        return join_engine_states(place.downwards(found), place.of_others(found))

    @override
    def _write(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        if not self._sharded:
            super()._write(checkpoint, filepath, storage_options)
            return
        path, place = refuse_remote(filepath), self._placed()
        divided = self.engine.plan is not None  # before the first batch every process holds the whole
        if divided and place.copy:
            ours = checkpoint.get(CHECKPOINT_KEY)
            checkpoint = {} if ours is None else {CHECKPOINT_KEY: under_way(ours)}
        outline, tensors = split_off(checkpoint, place.stage, place.copy)
        found = self._together(partial(gather, outline, self.root_device), "saving a checkpoint")
        if found is not None and divided:
            assert self.lightning_module is not None
            names = list(self.lightning_module.state_dict())
            outline = join_outlines(place.downwards(found), names, place.of_others(found))
        writes = divided or (place.copy == 0 and place.is_last)
        alone = outline if found is not None else None
        write_shards(tensors if writes else {}, alone, path, self._together, self.barrier)

    def _placed(self) -> Place:
        assert self._place is not None
        return self._place
