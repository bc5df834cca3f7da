"""The net and the batches of all contenders."""

from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni.estimators import LinearEstimator

CLASSES, FEATURES, HIDDEN, ROWS = 10, 64, 4, 256
BOUNDARIES = [f"net.{k}" for k in range(HIDDEN)]
LINEAR = partial(LinearEstimator, num_classes=CLASSES)
Batch = tuple[Tensor, Tensor]


class Net(pl.LightningModule):
    """A perceptron of 64 -> 4 x width ReLU -> 10."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (FEATURES, *[width] * HIDDEN)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*hidden, nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.net(x)

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def batches(steps: int) -> DataLoader[Batch]:
    """Random batches with random labels, too many to be learnt: saturated nets compute with denormals."""
    torch.manual_seed(1)
    pool = [(torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))) for _ in range(64)]
    return DataLoader([pool[k % len(pool)] for k in range(steps)], batch_size=None)
