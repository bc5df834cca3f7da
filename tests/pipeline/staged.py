"""Stages in turn, without processes, and the same model in one process, for tests that compare them."""

from functools import partial

import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS, blobs
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import (
    BackpropEstimator,
    ControlVariateEstimator,
    CriticCascade,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
    LowRankEstimator,
    MLPEstimator,
    SobolevEstimator,
)
from lightning_dni.pipeline.together import StagesTogether

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-2),
}
WIDTHS = {2: (5, 6, CLASSES), 3: (5, 6, 7, CLASSES), 4: (5, 6, 7, 6, CLASSES)}


TOLD = {
    "sobolev": partial(SobolevEstimator, num_classes=CLASSES, hidden_sizes=(8,)),
    "low rank": partial(LowRankEstimator, rank=2, num_classes=CLASSES),
    "control variate": partial(ControlVariateEstimator, fraction=0.5, num_classes=CLASSES),
    "cascade": partial(CriticCascade, num_classes=CLASSES, hidden_sizes=(8,)),
    "cascade over a critic": {
        "0": VECTOR_ESTIMATORS["critic"],
        "*": lambda spec: CriticCascade(spec, num_classes=CLASSES),
    },
}
"""What hears several things, or has more to be restored than its weights."""


WAITING = {
    "backprop": BackpropEstimator,
    "linear": partial(LinearEstimator, num_classes=CLASSES, prop_alpha=0.3),
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES, prop_alpha=0.3),
    "direct feedback alignment": DirectFeedbackAlignmentEstimator,
    "kickback": partial(KickbackEstimator, num_classes=CLASSES),
    "feedback alignment": FeedbackAlignmentEstimator,
    "feedback alignment at the bottom": {"0": FeedbackAlignmentEstimator, "*": TOLD["cascade"]},
    "feedback alignment at the top": {"0": BackpropEstimator, "*": FeedbackAlignmentEstimator},
    "kickback, made by a function": lambda spec: KickbackEstimator(spec, num_classes=CLASSES),
}


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(steps=50, dtype=torch.float32):
    """Every fifth is a partial one."""
    torch.manual_seed(1)
    return [blobs(rows=8 if i % 5 else 3, dtype=dtype) for i in range(steps)]


def together(model, estimator, data, staleness=0, optimizer="sgd", **options):
    boundaries = [str(k) for k in range(len(model) - 1)]
    return StagesTogether(
        model, boundaries, estimator, loss_of, OPTIMIZERS[optimizer], data[0], staleness, seed=3, **options
    )


def one_process(model, estimator, data, optimizer="sgd", accumulate=1, **options):
    boundaries = [str(k) for k in range(len(model) - 1)]
    engine = DNIEngine(model, boundaries, estimator, rng="stage", seed=3, **options)
    user = OPTIMIZERS[optimizer](model.parameters())
    return engine, train_whole(engine, model, user, data, accumulate=accumulate)


def train_whole(engine, model, user, data, loss_of=loss_of, accumulate=1):
    """The model's training in one process; returns the losses."""
    losses = []
    with engine:
        for i in range(0, len(data), accumulate):
            user.zero_grad()
            for batch in data[i : i + accumulate]:
                with engine.training_step(batch, accumulate=accumulate):
                    loss = loss_of(model, batch) / accumulate
                engine.backward(loss)
                losses.append(loss.detach() * accumulate)
            user.step()
            engine.update_estimators()
    return losses


def assert_same_bits(stages, engine, model):
    """The whole model, and every estimator with its buffers."""
    for name, value in stages.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    estimators = {n: e for each in stages.engines for n, e in each.estimators.items()}
    assert estimators.keys() == engine.estimators.keys()
    for name, estimator in estimators.items():
        for key, value in estimator.state_dict().items():
            assert torch.equal(value, engine.estimators[name].state_dict()[key]), (name, key)


class Blind(nn.Module):
    """Once it is told to, passes on something that depends on nothing that takes a gradient."""

    def __init__(self):
        super().__init__()
        self.map, self.blind = nn.Linear(6, 7), False

    def forward(self, x):
        return self.map(x).detach() if self.blind else self.map(x)
