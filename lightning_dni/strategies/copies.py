"""Copies of the whole pipeline: the processes that run the same stage train it together."""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dni.core.base import Engine
from lightning_dni.strategies.bucket import broadcast
from lightning_dni.strategies.placement import Place
from lightning_dni.strategies.reducer import GradientReducer


class Copies:
    """The group of the processes that run one stage, and the averages of their gradients.

    Args:
        place: Where this process stands.
        timeout: Of the groups, which every process makes in the same order.
        device: Where the stage computes.

    Attributes:
        group: The group.
        reducer: Averages gradients over it.
    """

    def __init__(self, place: Place, timeout: timedelta | None, device: torch.device) -> None:
        self._device = device
        groups = [dist.new_group(list(ranks), timeout) for ranks in place.ranks]
        self.group, self._first = groups[place.stage], place.ranks[place.stage][0]
        controls: list[dist.ProcessGroup | None] = [None] * len(groups)
        if dist.get_backend() != "gloo":
            controls = [dist.new_group(list(ranks), timeout, backend="gloo") for ranks in place.ranks]
        self._control = controls[place.stage] or self.group
        self.reducer = GradientReducer(timeout=timeout, group=self.group, control=self._control)
        self._buffers_differ = False

    def unite(self, bits: int) -> int:
        """All bits that any copy has set."""
        told = torch.tensor(bits)
        dist.all_reduce(told, dist.ReduceOp.BOR, group=self._control)
        return int(told)

    def total(self, value: Tensor) -> Tensor:
        """The sum of every copy's `value`."""
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def totals(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of every copy's gradient by parameter, of which each may lack some."""
        own = {n: torch.empty_like(gradient, device="meta") for n, gradient in gradients.items()}
        anywhere = {name: meta for each in self.reducer.gather(own) for name, meta in each.items()}
        found = {}
        for name, meta in sorted(anywhere.items()):
            gradient = gradients.get(name, torch.zeros_like(meta, device=self._device))
            found[name] = self.total(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        return found

    def share_buffers(self, module: nn.Module, engine: Engine, steps: bool) -> None:
        """Take over the first copy's buffers, where an optimizer step has been taken since.

        Args:
            module: The whole module.
            engine: This stage's.
            steps: Whether the batch that follows ends with an optimizer step.
        """
        if self._buffers_differ:
            buffers: list[Tensor] = list(module.buffers())
            for estimator in engine.estimators.values():
                buffers += estimator.buffers()
            broadcast(buffers, self._first, self.group)
        self._buffers_differ = steps
