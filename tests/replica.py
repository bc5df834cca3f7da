"""An engine that is one of two replicas, or the one process that sees every row."""

from functools import partial

import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS, assert_close, blobs, mlp, run_step, same_bits
from processes import on_ranks
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import ConvEstimator, MLPEstimator
from lightning_dni.strategies.reducer import GradientReducer

LINEAR = VECTOR_ESTIMATORS["linear"]
ESTIMATORS = VECTOR_ESTIMATORS | {
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES, batch_norm=False),
    "conv": partial(ConvEstimator, hidden_channels=(), kernel_size=3, num_classes=CLASSES),
}
SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = 5


def net(kind="mlp"):
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(widths=(5, 6, 7, 6, CLASSES))
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.Tanh()) for c in (2, 4)]
    return nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, CLASSES))).double()


def batches(steps=STEPS, kind="mlp", rows=8):
    torch.manual_seed(1)
    if kind == "mlp":
        return [blobs(rows) for _ in range(steps)]
    return [(torch.randn(rows, 2, 4, 4).double(), torch.randint(CLASSES, (rows,))) for _ in range(steps)]


class Replica:
    """A net, its engine and its optimizer; `rank` None for the one process that sees every row."""

    def __init__(
        self, rank, model=None, estimator=LINEAR, boundaries=None, cap=25.0, split=(4, 4), **options
    ):
        self.rank, self.model, self.split = rank, net() if model is None else model, split
        self.reducer = None if rank is None else GradientReducer(cap)
        self.engine = DNIEngine(
            self.model,
            boundaries or [str(k) for k in range(len(self.model) - 1)],
            estimator,
            seed=3,
            exchange=self.reducer,
            rank=rank or 0,
            estimator_optimizer=SGD,
            **options,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.engine.attach()

    def own(self, batch):
        """This replica's rows."""
        return batch if self.rank is None else self.part(batch, self.rank)

    def part(self, batch, rank):
        return tuple(t.split(self.split)[rank] for t in batch)

    def step(self, batch, loss_of=F.cross_entropy, **options):
        self.optimizer.zero_grad()
        loss = run_step(self.engine, self.model, self.own(batch), loss_of, **options)
        self.update()
        return loss

    def update(self):
        self.optimizer.step()
        self.engine.update_estimators()

    def state(self):
        """All weights and all gradients' presence, by name."""
        found = {n: t.clone() for n, t in self.model.state_dict().items()}
        for boundary, estimator in self.engine.estimators.items():
            found |= {f"{boundary}: {n}": t.clone() for n, t in estimator.state_dict().items()}
        return found


def assert_replicas_do_what_one_does(run, *args, **options):
    """Two processes are equal bit for bit, and to 1e-10 what one is on the joint batch."""
    first, second = on_ranks(partial(run, **options), *args)
    assert same_bits(first, second)
    assert_close(first, run(None, *args, **options), atol=1e-10)
    return first
