"""Delayed gradients in one stage: graphs of earlier batches that wait, with the weights they were made with.

The gradient of a batch arrives `staleness` updates after the stage above has found it, and that stage may
have waited itself. So the graph of a batch is kept for `staleness` updates per stage above, and then is
differentiated as it would have been at once. The lag is the same however fast the stages are.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from lightning_dni.core.pool import EstimatorFactory, made_by
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators.delayed import DelayedGradientEstimator
from lightning_dni.pipeline.crossing import say_again
from lightning_dni.pipeline.pending import Pending


class Stash:
    """Parameters and buffers as they are now, for a backward pass after they have moved on.

    What autograd saves of them in a forward pass is read from here later; parameters are these again, too,
    while an activation checkpoint runs something once more. Whatever else is saved must not change.

    Args:
        parameters: Those of a stage.
        buffers: Its buffers, which are copied where they are saved.
    """

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> None:
        self._parameters = list(parameters)
        self._own = {t.untyped_storage().data_ptr() for t in (*self._parameters, *buffers)} - {0}
        self._copies: dict[tuple[int, int], UntypedStorage] = {}
        self._then = [self._copy(p) for p in self._parameters]

    def filled(self) -> saved_tensors_hooks:
        """A block around the forward pass."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _copy(self, tensor: Tensor) -> Tensor:
        """What `tensor`, a parameter or buffer or a view of one, is now; one copy of each is made."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor._version
        if key not in self._copies:
            self._copies[key] = storage.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(self._copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int | None]:
        if tensor.untyped_storage().data_ptr() in self._own:
            return self._copy(tensor), None
        return tensor, tensor._version

    def _unpack(self, packed: tuple[Tensor, int | None]) -> Tensor:
        tensor, version = packed
        if version is not None and tensor._version != version:
            raise StageError(
                "Expected what a stage's backward pass needs to stay as it is until the delayed gradient is "
                f"there, but a tensor of shape {tuple(tensor.shape)} was changed in place. Make the change "
                "out of place."
            )
        return tensor

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block in which the parameters are what they were."""
        now = [p.data for p in self._parameters]
        try:
            for p, then in zip(self._parameters, self._then, strict=True):
                p.data = then
            yield
        finally:
            for p, data in zip(self._parameters, now, strict=True):
                p.data = data


class Waiting(NamedTuple):
    """A batch whose gradient is still to come.

    Attributes:
        crossing: Its crossing of the upper boundary, with the stage's graph.
        received: The leaves that it got from the stage below.
        weights: What the parameters were.
    """

    crossing: Pending
    received: Sequence[Tensor]
    weights: Stash


class Late:
    """The batches of one stage that wait, oldest first.

    Args:
        staleness: The lag of one stage, in updates.
        above: Number of stages above.
        take: Waits for the gradient of a crossing, if it is not here yet.
    """

    def __init__(self, staleness: int, above: int, take: Callable[[Pending], None]) -> None:
        self._lag, self._on_the_way = staleness * above, staleness * (above - 1)
        self._take = take
        self._waiting: deque[Waiting] = deque()
        self._stash = Stash([])
        self._gone: list[Pending] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def stashing(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> saved_tensors_hooks:
        """A block around a forward pass with these parameters and buffers."""
        self._stash = Stash(parameters, buffers)
        return self._stash.filled()

    def add(self, crossing: Pending, received: Sequence[Tensor]) -> None:
        """That forward pass is over."""
        self._waiting.append(Waiting(crossing, received, self._stash))
        self._stash = Stash([])

    def due(self, update: int) -> Iterator[Waiting]:
        """What is to be differentiated in `update`, its gradient at hand; waits for it."""
        while self._waiting and self._waiting[0].crossing.update <= update - self._lag:
            waiting = self._waiting.popleft()
            self._take(waiting.crossing)
            say_again(waiting.crossing)
            waiting.crossing.cut.applied = waiting.crossing.cut.said
            self._gone.append(waiting.crossing)
            yield waiting

    def gone(self) -> list[Pending]:
        """What was differentiated since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def drain(self, update: int) -> None:
        """Receive early what the stage above has sent by the end of `update`."""
        for waiting in self._waiting:
            if waiting.crossing.update <= update - self._on_the_way:
                self._take(waiting.crossing)


def delays_in_common(factories: Mapping[str, EstimatorFactory], staleness: int) -> bool:
    """Whether the stages of a pipeline are given delayed gradients, which all of them have to be.

    Args:
        factories: What makes the estimator of each boundary.
        staleness: The lag, in updates.

    Raises:
        EstimatorError: Only some are, or their delay is not the lag.
    """
    delays = {name: _delay_of(factory) for name, factory in factories.items()}
    if not any(delays.values()):
        return False
    if set(delays.values()) != {staleness}:
        raise EstimatorError(
            "Expected DelayedGradientEstimator at every boundary of a pipeline or at none, with `delay` as "
            f"its staleness={staleness}, but got delays {delays}. Pass the delay as `staleness`, and "
            "partial(DelayedGradientEstimator, delay=...) for all boundaries; mixtures train in one process: "
            "strategy='dni'."
        )
    return True


def _delay_of(factory: Any) -> int | None:
    """The delay of what `factory` makes, as far as that can be read off it."""
    if made_by(factory) is not DelayedGradientEstimator:
        return None
    given: int = factory.keywords.get("delay", 1) if isinstance(factory, partial) else 1
    return given


def warn_of_dropped(number: int, boundary: str | None) -> None:
    """Say that a fit begins without `number` batches that waited at `boundary` when the last one ended."""
    warnings.warn(
        f"Expected delayed gradients to be given, but {number} under way at {boundary!r} when the last fit "
        "ended are dropped: their batches have left the pipeline. Train in one fit (max_epochs=), or in one "
        "process: strategy='dni'.",
        stacklevel=2,
    )


def refuse_in_late_stage(who: str, known: bool, beside: Mapping[str, bool]) -> None:
    """Refuse what a stage with delayed gradients cannot do.

    Args:
        who: The estimator, by kind and place.
        known: Whether it was known beforehand that gradients are delayed.
        beside: What there may be, in words, and whether it is there.

    Raises:
        EstimatorError: It was not known, or something is there.
    """
    if not known:
        raise EstimatorError(
            f"Expected to know beforehand that gradients are delayed in a pipeline, but got {who} from a "
            "function. Pass the class or a partial of it."
        )
    found = [what for what, is_there in beside.items() if is_there]
    if found:
        raise EstimatorError(
            f"Expected one batch per update, one copy of the pipeline and no probes, but got {who} and "
            f"{', '.join(found)}. Leave that out (GradientMonitor(probe=False)), or train in one process: "
            "strategy='dni'."
        )
