"""The engine and the paper's algorithm on the same data, for tests that compare them."""

import copy
from functools import partial

import torch
from core.nets import CLASSES, Told, attached, blobs, mlp
from oracles import LinearMap, PaperDNI
from torch.nn import functional as F

from lightning_dni.core import GradientEstimator, Signal, SplitOptimizer
from lightning_dni.core.target import sg_loss
from lightning_dni.estimators import LinearEstimator

WIDTHS = (5, 6, 7, 6, CLASSES)
BOUNDARIES = ["0", "1", "2"]


def by_kind(module, lr, make):
    """An optimizer with two groups: weights at `lr` with decay, everything else at a tenth without."""
    kinds = [[p for p in module.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
    return make(
        [{"params": kinds[0], "weight_decay": 0.1, "lr": lr}, {"params": kinds[1], "lr": lr / 10}], lr=lr
    )


OPTIMIZERS = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), 0.1),
    "momentum": lambda module: torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda module: torch.optim.Adam(module.parameters(), 1e-2),
    "fused": lambda module: torch.optim.AdamW(module.parameters(), 1e-2, fused=True),
    "groups": partial(by_kind, lr=0.05, make=partial(torch.optim.SGD, momentum=0.9)),
    "adam groups": partial(by_kind, lr=0.01, make=torch.optim.AdamW),
}


class Mapped(GradientEstimator):
    """A `LinearMap` that learns as the twin's does, operation by operation."""

    needs = frozenset({Signal.TARGET})
    num_classes = CLASSES

    def __init__(self, spec):
        super().__init__()
        self.map = LinearMap(spec.shape[0], CLASSES, spec.leaves[0].dtype)

    def synthesize(self, h, context, state):
        return (self.map(h[0], context),), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


ESTIMATORS = {torch.float64: partial(LinearEstimator, num_classes=CLASSES), torch.float32: Mapped}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 0.0}
"""Other sums of the same numbers in float64; the same operations, to the bit, in float32."""


def batches(number, dtype):
    return [blobs(8, 5, dtype) for _ in range(number)]


def twin_of(model, optimizer):
    """The paper's algorithm on copies of the stages of `model`."""
    stages = copy.deepcopy(model)
    dtype = next(stages.parameters()).dtype
    maps = [LinearMap(width, CLASSES, dtype) for width in WIDTHS[1:-1]]
    return PaperDNI(stages, maps, optimizer, lambda m: torch.optim.SGD(m.parameters(), 0.5))


def trained(data, optimizer, update="immediate", before=lambda engine, step: None, **options):
    """A model that was trained on `data`, a copy of it from before, its engine, and the user's optimizer."""
    dtype = data[0][0].dtype
    torch.manual_seed(3)
    # in float64 sums differ, and Adam blows up the rounding in a bias that batch norm makes useless
    model = mlp(WIDTHS, batch_norm=dtype == torch.float32, dtype=dtype)
    start = copy.deepcopy(model)
    options = {"estimator_optimizer": partial(torch.optim.SGD, lr=0.5), "seed": 7, **options}
    engine = attached(model, BOUNDARIES, ESTIMATORS[dtype], update=update, **options)
    user = optimizer(model)
    engine.updater = SplitOptimizer(user) if update == "immediate" else None
    for step, (x, y) in enumerate(data):
        before(engine, step)
        user.zero_grad()
        with engine.training_step((x, y)):
            loss = F.cross_entropy(model(x), y)
        engine.backward(loss)
        user.step()
        engine.update_estimators()
    engine.detach()
    return model, start, engine, user


def immediate(model, boundaries=("0",), estimator=Told, optimizer=None, **options):
    """An attached engine with immediate updates."""
    engine = attached(model, list(boundaries), estimator, update="immediate", **options)
    engine.updater = SplitOptimizer(OPTIMIZERS["sgd"](model) if optimizer is None else optimizer)
    return engine
