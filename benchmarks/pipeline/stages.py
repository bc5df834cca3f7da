"""Stages whose compute is simulated: they sleep, as a process does whose GPU works."""

import ctypes
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, WIDTH, BATCH = 10, 256, 64
Batch = tuple[Tensor, Tensor]


def sleep_precisely() -> None:
    """Have Linux wake a sleeping process to the microsecond, not up to 50 later."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class SimulatedStage(nn.Module):
    """`h * weight`, which takes `seconds` for a batch of `BATCH` rows: a third forward, the rest backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.seconds = seconds

    def forward(self, h: Tensor) -> Tensor:
        """`[rows, WIDTH]`; fewer rows take less time."""
        seconds = self.seconds * len(h) / BATCH
        return _Sleep.apply(h * self.weight, seconds / 3, seconds * 2 / 3)  # type: ignore[no-any-return]


def loss_of(h: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the first features."""
    return F.cross_entropy(h[:, :CLASSES], y)


class Net(pl.LightningModule):
    """Stages `net.0`, `net.1`, ... one after another."""

    def __init__(self, stages: list[nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(*stages)

    def training_step(self, batch: Batch) -> Tensor:
        """The loss."""
        return loss_of(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def batches(count: int) -> list[Batch]:
    """The same on every process."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(8, BATCH, WIDTH, generator=generator)
    ys = torch.randint(CLASSES, (8, BATCH), generator=generator)
    few = list(zip(xs, ys, strict=True))
    return [few[k % 8] for k in range(count)]
