"""Gradients side by side in one flat tensor, which is averaged over processes by one collective."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


class Bucket:
    """Views for the gradients of `variables`, all of one dtype and device, in one flat tensor.

    The flat tensor stays; a gradient is copied in before it is sent, and out into the parameter's own
    `.grad` when the average is there, so nobody else's tensor is ever an alias of it.
    """

    def __init__(self, variables: Sequence[Tensor]) -> None:
        self.variables = list(variables)
        ends = list(accumulate(v.numel() for v in variables))
        self._flat = torch.zeros(ends[-1], dtype=variables[0].dtype, device=variables[0].device)
        self.views = [
            self._flat[end - v.numel() : end].view(v.shape) for v, end in zip(variables, ends, strict=True)
        ]
        self._work: dist.Work | None = None

    def fill(self) -> None:
        """Copy what `.grad` holds, zero where it is None."""
        views, grads = [], []
        for variable, view in zip(self.variables, self.views, strict=True):
            if variable.grad is None:
                view.zero_()
            else:
                views.append(view)
                grads.append(dense(variable.grad))
        if views:
            torch._foreach_copy_(views, grads)

    def launch(self) -> None:
        """Start averaging; divided first and summed then, as torch's DDP does."""
        if dist.get_world_size() > 1:
            self._flat.mul_(1.0 / dist.get_world_size())
        self._work = dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> None:
        """Wait for the average."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def write(self, present: Sequence[bool]) -> None:
        """Copy the averages into `.grad` where any process had a gradient."""
        views: list[Tensor] = []
        grads: list[Tensor] = []
        for variable, view, there in zip(self.variables, self.views, present, strict=True):
            if not there:
                continue
            if variable.grad is None or variable.grad.is_sparse:
                variable.grad = view.clone()
            else:
                views.append(view)
                grads.append(variable.grad)
        if views:
            torch._foreach_copy_(grads, views)


def dense(gradient: Tensor) -> Tensor:
    """The gradient as an ordinary tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def average_sparse(variable: Tensor) -> None:
    """Average a sparse `.grad`; None counts as zero."""
    grad = torch.zeros_like(variable).to_sparse(1) if variable.grad is None else variable.grad
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce() * (1.0 / dist.get_world_size())
    dist.all_reduce(grad)
    variable.grad = grad


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0, one collective per dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.broadcast(flat.view(torch.uint8), src=0)  # bytes: every backend takes them, whatever the dtype
        pieces = torch.split(flat, [t.numel() for t in alike])
        torch._foreach_copy_(alike, [p.view(t.shape) for p, t in zip(pieces, alike, strict=True)])
