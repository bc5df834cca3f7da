"""A net whose stages run on predicted inputs, and its training."""

from functools import partial
from typing import final

import torch
from core.nets import CLASSES, attached, blobs, mlp, update, weights
from torch import nn

from lightning_dni import MLPInputEstimator
from lightning_dni.core import InputEstimator, SplitOptimizer
from lightning_dni.estimators import LinearEstimator

FEATURES, WIDTHS, NAMES, HIDDEN = 5, (6, 7, 6), ["0", "1", "2"], 8
LINEAR = partial(LinearEstimator, num_classes=CLASSES)
SMALL = partial(MLPInputEstimator, hidden_sizes=(HIDDEN,))
sgd, adam = partial(torch.optim.SGD, lr=0.05), partial(torch.optim.Adam, lr=1e-2)


def net(dtype=torch.float64, batch_norm=True):
    torch.manual_seed(0)
    model = mlp((FEATURES, *WIDTHS, CLASSES), batch_norm=batch_norm, dtype=dtype)
    for stage in model[:-1]:  # Adam blows up the rounding in a bias that batch norm makes useless
        stage[0].bias = None if batch_norm else stage[0].bias
    return model


def batches(number, dtype=torch.float64):
    torch.manual_seed(1)
    return [blobs(8 if i % 3 else 5, FEATURES, dtype) for i in range(number)]


def engine_of(model, factories=SMALL, **options):
    given = {"synthetic_inputs": factories, "input_optimizer": sgd, "estimator_optimizer": sgd, "seed": 7}
    return attached(model, NAMES, **{"estimator": LINEAR, **given, **options})


def trained(model, data, optimizer=sgd, **options):
    engine, user = engine_of(model, **options), optimizer(model.parameters())
    engine.updater = SplitOptimizer(user) if options.get("update") == "immediate" else None
    losses = [loss for batch in data for loss in update(engine, model, user, [batch])]
    engine.detach()
    return engine, losses


def inputs_of(engine):
    found = {n: weights(e) for n, e in engine.input_estimators.items()}
    return {f"{name}: {key}": value for name, state in found.items() for key, value in state.items()}


@final
class Constant(InputEstimator):
    def __init__(self, spec, rows=None):
        super().__init__()
        self.shape, self.rows = spec.shape, rows
        self.value = nn.Parameter(torch.zeros(spec.shape))

    def predict(self, x):
        return (self.value.expand(self.rows or len(x), *self.shape),)
