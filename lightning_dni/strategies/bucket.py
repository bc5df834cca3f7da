"""Gradients side by side in one flat tensor, which is averaged over processes by one collective."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

BROADCAST_BYTES = 250 * 2**20
"""A broadcast is sent once it has this size, so that no second copy of a whole model is made."""


class Bucket:
    """Views for the gradients of `variables`, all of one dtype and device, in one flat tensor.

    The flat tensor stays; a gradient is copied in before it is sent, and out into the parameter's own
    `.grad` when the average is there, so nobody else's tensor is ever an alias of it.

    Args:
        variables: Whose gradients it holds.
        group: The processes that average it; None: all, in the default group.
    """

    def __init__(self, variables: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
        self.variables, self._group = list(variables), group
        ends = list(accumulate(v.numel() for v in variables))
        self._flat = torch.zeros(ends[-1], dtype=variables[0].dtype, device=variables[0].device)
        self.views = [
            self._flat[end - v.numel() : end].view(v.shape) for v, end in zip(variables, ends, strict=True)
        ]
        self._work: dist.Work | None = None

    def fill(self) -> None:
        """Copy what `.grad` holds, zero where it is None."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for variable, view in zip(self.variables, self.views, strict=True):
            if variable.grad is None:
                view.zero_()
            else:
                pairs.append((view, dense(variable.grad)))
        copy_all(pairs)

    def launch(self) -> None:
        """Start averaging; divided first and summed then, as torch's DDP does."""
        size = dist.get_world_size(self._group)
        if size > 1:
            self._flat.mul_(1.0 / size)
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the average."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def write(self, present: Sequence[bool]) -> None:
        """Copy the averages into `.grad` where any process had a gradient."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for variable, view, there in zip(self.variables, self.views, present, strict=True):
            if not there:
                continue
            if variable.grad is None or variable.grad.is_sparse:
                variable.grad = view.clone()
            else:
                pairs.append((variable.grad, view))
        copy_all(pairs)


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, in as few kernels as it takes."""
    if pairs:
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])


def add_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the second of each pair to the first."""
    if pairs:
        torch._foreach_add_([to for to, _ in pairs], [term for _, term in pairs])


def dense(gradient: Tensor) -> Tensor:
    """The gradient as an ordinary tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def average_sparse(variable: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Average a sparse `.grad`; None counts as zero."""
    grad = torch.zeros_like(variable).to_sparse(1) if variable.grad is None else variable.grad
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce() * (1.0 / dist.get_world_size(group))
    dist.all_reduce(grad, group=group)
    variable.grad = grad


def broadcast(
    tensors: Sequence[Tensor],
    source: int = 0,
    group: dist.ProcessGroup | None = None,
    through: torch.device | None = None,
) -> None:
    """Overwrite `tensors` with those of global rank `source`, many at once, in a group or everywhere.

    Args:
        tensors: As many on every rank, in the same order.
        source: Global rank.
        group: The processes; None: all.
        through: Where they are brought to be sent; None: they are on like devices on all ranks.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = {}
    held = 0
    for tensor in tensors:
        chunks = kinds.setdefault((tensor.dtype, through or tensor.device), [[]])
        if held > BROADCAST_BYTES:
            chunks.append([])
            held = 0
        chunks[-1].append(tensor.detach())
        held += tensor.numel() * tensor.element_size()
    for device, chunk in ((device, chunk) for (_, device), chunks in kinds.items() for chunk in chunks):
        flat = torch.cat([t.reshape(-1).to(device) for t in chunk])
        dist.broadcast(
            flat.view(torch.uint8), src=source, group=group
        )  # bytes: every backend takes them, whatever the dtype
        pieces = torch.split(flat, [t.numel() for t in chunk])
        copy_all([(t, piece.view(t.shape)) for t, piece in zip(chunk, pieces, strict=True)])
