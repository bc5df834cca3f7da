"""What a resumed run must share with the uninterrupted one, and a loader that knows where it is."""

import torch
from fits import Net, dataset
from torch import nn

from lightning_dni.core import GradientEstimator, Signal
from lightning_dni.core.target import sg_loss


class Shuffled:
    """Shuffles with the epoch as seed, and goes on where its state says it was.

    Args:
        rows: Number of rows.
        batch_size: Rows of a batch.
        share: Which rows of each batch are given: the first of so many, and so on.
    """

    def __init__(self, rows=80, batch_size=8, share=(0, 1)):
        self.data, self.batch_size = dataset(rows), batch_size
        self.epoch = self.position = 0
        self.share = slice(share[0], None, share[1])

    def __len__(self):
        return len(self.data) // self.batch_size

    def __iter__(self):
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            rows = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            self.position += 1
            yield self.data[rows[self.share]]

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class NoisyEstimator(GradientEstimator):
    """A linear map of `h` with dropout: draws from its own stream whenever it runs."""

    needs = frozenset({Signal.TARGET})
    stochastic = True

    def __init__(self, spec):
        super().__init__()
        self.map = nn.Linear(spec.shape[0], spec.shape[0])
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def synthesize(self, h, context, state):
        return (self.map(nn.functional.dropout(h[0], 0.5)),), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


class Annealed(Net):
    """Its rate moves with every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def leaves(value):
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (*leaves(k), *leaves(v))]
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


def state_of(trainer, engine=True):
    """Weights, both optimizers, schedulers, estimators and their streams, flat."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    ours = [trainer.strategy.engine.state_dict()] if engine else []
    parts = [trainer.lightning_module.state_dict(), *ours]
    parts += [made.state_dict() for made in (*trainer.optimizers, *schedulers)]
    return [
        leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for part in parts for leaf in leaves(part)
    ]


def assert_same_state(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
