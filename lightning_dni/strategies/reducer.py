"""GradientReducer: averages gradients over processes while the forward pass is still going on.

Every process sends the same buckets in the same order, whatever its own control flow: a bucket goes out as
soon as it is complete here and all before it have gone out; at the end of the step the rest follows. Then
one small collective tells whether what was sent was right everywhere (validity is only known once the loss
came back) and which parameters have a gradient anywhere. If it was not right, everything is sent again from
the totals, and the plan is made anew.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dni.core.exchange import Named
from lightning_dni.core.stage import accumulate
from lightning_dni.strategies.bucket import Bucket, add_all, average_sparse, broadcast, copy_all, dense
from lightning_dni.strategies.plan import AT_THE_END, Plan, Sighting, Slot, agree

PATIENCE = 16
"""Steps in a row that have to ask for another plan before it is made (twice as many the next time)."""

WRONG, UNPLANNED, ANOTHER_PLAN = range(3)
"""What a process says about its step, at these places of the small collective."""


class GradientReducer:
    """The `Exchange` of the processes in a group.

    Args:
        bucket_cap_mb: Megabytes at which a bucket is full.
        timeout: Of the groups that are made where none is given.
        group: The processes; None: all of them, in a group of its own.
        control: For small messages between CPUs, where `group` is not gloo, so that none waits for an
            accelerator.

    Attributes:
        launched_early: Buckets of the last exchanged step that were sent before its end.
    """

    def __init__(
        self,
        bucket_cap_mb: float = 25.0,
        timeout: timedelta | None = None,
        group: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self._cap = int(bucket_cap_mb * 2**20)
        if group is None:
            # when a bucket is complete may differ between processes: in the default group it could then go
            # out before a collective of the user's in one and after it in another
            group = dist.new_group(timeout=timeout)
            control = (
                None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
            )
        self._processes, self._control = group, control or group
        self._plan = Plan([], [])
        self._slots: dict[Tensor, Slot] = {}
        self._buckets: list[Bucket] = []
        self._sparse: list[Tensor] = []
        self._averaged: list[Bucket] = []
        self._missing: list[int] = []
        self._strangers: list[Tensor] = []
        self._ready: list[int] = []
        self._fresh = True
        self._next = self._group = self._order = 0
        self._streak, self._patience = 0, PATIENCE
        self.launched_early = 0

    @property
    def launched(self) -> int:
        """Buckets of this step that were sent so far."""
        return self._next

    # ---- during the step

    def begin(self, fresh: bool) -> None:
        """Forget the last step."""
        self._fresh = fresh
        self._next = self._group = self._order = 0
        self._ready.clear()
        for bucket in self._buckets:  # of a step that was never finished
            bucket.wait()
        for stranger in self._strangers:
            del self._slots[stranger]
        self._strangers.clear()
        for slot in self._slots.values():
            slot.reset()
        self._missing = [len(bucket.variables) for bucket in self._buckets]

    def end_group(self) -> None:
        """What follows comes clearly later."""
        self._group += 1

    def offer(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy gradients to where they are sent from, and send what is complete."""
        copied: list[tuple[Tensor, Tensor]] = []
        added: list[tuple[Tensor, Tensor]] = []
        for variable, gradient in gradients:
            slot = self._sight(variable)
            slot.offers += 1
            if not slot.expected or slot.offers > slot.expected or gradient.is_sparse:
                continue
            if slot.offers == 1:
                slot.remember_base(None if self._fresh else variable.grad)
                copied.append((slot.view, gradient))
                if slot.base is not None:
                    added.append((slot.view, dense(slot.base)))
            else:
                added.append((slot.view, gradient))
            if slot.offers == slot.expected:
                self._complete(slot)
        copy_all(copied)
        add_all(added)
        self._launch_complete()

    def offer_accumulated(self, variables: Iterable[Tensor]) -> None:
        """The same for what the loss has left in `.grad`."""
        copied: list[tuple[Tensor, Tensor]] = []
        for variable in variables:
            if variable.grad is None:
                continue
            slot = self._sight(variable)
            slot.by_loss = True
            if slot.expected == 0 and not slot.offers and not variable.grad.is_sparse:
                slot.remember_base(variable.grad)
                copied.append((slot.view, variable.grad))
                self._complete(slot)
        copy_all(copied)
        self._launch_complete()

    def _sight(self, variable: Tensor) -> Slot:
        slot = self._slots.get(variable)
        if slot is None:
            slot = self._slots[variable] = Slot(variable)
            self._strangers.append(variable)
        self._order += 1
        slot.group, slot.order = self._group, self._order
        return slot

    def _complete(self, slot: Slot) -> None:
        assert slot.bucket is not None
        self._missing[slot.bucket] -= 1
        if not self._missing[slot.bucket]:
            self._ready.append(slot.bucket)

    def _launch_complete(self) -> None:
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._buckets[self._next].launch()
            self._next += 1

    # ---- at its end

    def merge(self, gradients: Sequence[tuple[Tensor, Tensor]], named: Named) -> None:
        """Add what counts to `.grad`, check what was sent, send the rest, and wait for all averages.

        Raises:
            StageError: The processes do not have the same parameters.
        """
        counted = Counter(variable for variable, _ in gradients)
        self.launched_early = self._next
        wrong = self._find_wrong(counted)
        completed_by = {v: slot.completed_by(counted[v]) for v, slot in self._slots.items()}
        accumulate(gradients)
        parameters = named()
        for bucket in self._buckets[self._next :]:
            bucket.fill()
            bucket.launch()
        planned = self._slots.keys() - self._strangers
        unplanned = any(p.grad is not None and p not in planned for p in parameters.values())
        told = self._tell([wrong, unplanned, self._wants_another_plan(completed_by)], self._planned())
        if any(told[:3]):
            for bucket in self._buckets:
                bucket.wait()
            present = self._start_again(parameters, completed_by)
        else:
            present = told[3:]
        self._finish(present)

    def _find_wrong(self, counted: Mapping[Tensor, int]) -> bool:
        wrong = [
            slot
            for slot in self._slots.values()
            if slot.bucket is not None
            and slot.bucket < self._next
            and not slot.was_sent_right(counted[slot.variable])
        ]
        for slot in wrong:
            slot.suspect = True
        return bool(wrong)

    def _wants_another_plan(self, completed_by: Mapping[Tensor, int | None]) -> bool:
        """Whether the plan has kept buckets waiting for long that another one would have sent."""
        better = (
            self._ready != sorted(self._ready)
            or any(map(self._is_spread, self._buckets))
            or any(
                slot.bucket is not None and slot.expected is None and completed_by[v] is not None
                for v, slot in self._slots.items()
            )
        )
        self._streak = self._streak + 1 if better else 0
        if self._streak < self._patience:
            return False
        self._streak, self._patience = 0, 2 * self._patience
        return True

    def _is_spread(self, bucket: Bucket) -> bool:
        slots = [self._slots[v] for v in bucket.variables]
        return len({s.group for s in slots if s.order and s.expected is not None}) > 1

    def _planned(self) -> list[Tensor]:
        return [v for bucket in self._buckets for v in bucket.variables] + self._sparse

    def _tell(self, flags: Sequence[bool], variables: Sequence[Tensor]) -> list[bool]:
        """Whether any process has raised each flag, and has a gradient for each of `variables`."""
        said = [*flags, *(v.grad is not None for v in variables)]
        heard = torch.tensor(said, dtype=torch.uint8)
        dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._control)
        return [bool(h) for h in heard.tolist()]

    def _start_again(
        self, parameters: Mapping[str, Tensor], completed_by: Mapping[Tensor, int | None]
    ) -> list[bool]:
        """Make a plan of what this step has shown, and send everything by it."""
        mine = {name: self._sighting(p, completed_by.get(p)) for name, p in parameters.items()}
        sightings: list[Any] = [None] * dist.get_world_size(self._control)
        dist.all_gather_object(sightings, mine, group=self._control)
        planned = self._plan.names
        self._plan = agree(sightings, planned, self._cap)
        self._adopt(parameters, completed_by)
        # estimators are built by now, with whatever the user's factory has drawn
        fresh = [parameters[name] for name in self._plan.names if name not in set(planned)]
        broadcast(fresh, dist.get_global_rank(self._processes, 0), self._processes)
        for bucket in self._buckets:
            bucket.fill()
            bucket.launch()
        return [any(seen[name].present for seen in sightings) for name in self._plan.names]

    def _sighting(self, variable: Tensor, completed_by: int | None) -> Sighting:
        grad, slot = variable.grad, self._slots.get(variable)
        late = slot is None or completed_by is None
        return Sighting(
            shape=tuple(variable.shape),
            dtype=str(variable.dtype).removeprefix("torch."),
            present=grad is not None,
            sparse=grad is not None and grad.is_sparse,
            group=AT_THE_END if slot is None or late else slot.group,
            order=0 if slot is None else slot.order,
        )

    def _adopt(self, parameters: Mapping[str, Tensor], completed_by: Mapping[Tensor, int | None]) -> None:
        """Lay the parameters out as the plan says."""
        before, self._slots, self._buckets = self._slots, {}, []
        for names in self._plan.buckets:
            bucket = Bucket([parameters[name] for name in names], self._processes)
            for variable, view in zip(bucket.variables, bucket.views, strict=True):
                old = before.get(variable)
                self._slots[variable] = Slot(
                    variable,
                    len(self._buckets),
                    view,
                    expected=completed_by.get(variable),
                    suspect=old is not None and old.suspect,
                )
            self._buckets.append(bucket)
        self._sparse = [parameters[name] for name in self._plan.sparse]
        for variable in self._sparse:
            self._slots[variable] = Slot(variable)
        self._strangers.clear()

    def _finish(self, present: Sequence[bool]) -> None:
        start = 0
        for bucket in self._buckets:
            bucket.wait()
            end = start + len(bucket.variables)
            bucket.write(present[start:end])
            start = end
        for variable, there in zip(self._sparse, present[start:], strict=True):
            if there:
                average_sparse(variable, self._processes)

    # ---- apart from steps

    def average(self, parameters: Sequence[Tensor]) -> None:
        """Average `.grad` of these, as the estimators' further steps need it."""
        held = [v for bucket in self._averaged for v in bucket.variables]
        if len(held) != len(parameters) or {id(v) for v in held} != {id(p) for p in parameters}:
            kinds: dict[torch.dtype, list[Tensor]] = {}
            for parameter in parameters:
                kinds.setdefault(parameter.dtype, []).append(parameter)
            self._averaged = [Bucket(alike, self._processes) for alike in kinds.values()]
            held = [v for bucket in self._averaged for v in bucket.variables]
        present = self._tell([], held)
        for bucket in self._averaged:
            bucket.fill()
            bucket.launch()
        start = 0
        for bucket in self._averaged:
            bucket.wait()
            bucket.write(present[start : start + len(bucket.variables)])
            start += len(bucket.variables)

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, which can be pickled and lies on the CPU."""
        found: list[Any] = [None] * dist.get_world_size(self._control)
        dist.all_gather_object(found, value, group=self._control)
        return found

    def agree(self, yes: bool) -> bool:
        """Whether every process says yes."""
        return not self._tell([not yes], [])[0]
