"""Small nets, estimators and steps that the tests of the engine share."""

from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import jaxtyping
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine, GradientEstimator
from lightning_dni.estimators import (
    ConvEstimator,
    CriticEstimator,
    LinearEstimator,
    LocalLossEstimator,
    MLPEstimator,
    ZeroEstimator,
)

CLASSES = 3
LAMBDAS = (0.0, 0.5, 1.0)
VECTOR_ESTIMATORS = {
    "zero": ZeroEstimator,
    "linear": partial(LinearEstimator, num_classes=CLASSES),
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES),
    "local_loss": partial(LocalLossEstimator, num_classes=CLASSES, hidden_sizes=(8,)),
    "critic": partial(CriticEstimator, num_classes=CLASSES, hidden_sizes=(8,)),
}
MAP_ESTIMATORS = {"conv": partial(ConvEstimator, hidden_channels=(4,), kernel_size=3, num_classes=CLASSES)}


class Told(GradientEstimator):
    """Gives a gradient that the test knows: `rule` of every leaf."""

    def __init__(self, spec, rule=torch.sin):
        super().__init__()
        self.rule = rule

    def synthesize(self, h, context, state):
        return tuple(self.rule(leaf) for leaf in h), None


def mlp(widths=(5, 6, 7, CLASSES), dropout=0.0, batch_norm=False, dtype=torch.float64):
    """Stages as children '0', '1', ...: linear, [batch norm,] tanh[, dropout]; a linear one on top."""
    stages = []
    for a, b in pairwise(widths[:-1]):
        norm = [nn.BatchNorm1d(b)] if batch_norm else []
        drop = [nn.Dropout(dropout)] if dropout else []
        stages.append(nn.Sequential(nn.Linear(a, b), *norm, nn.Tanh(), *drop))
    stages.append(nn.Linear(widths[-2], widths[-1]))
    return nn.Sequential(*stages).to(dtype)


def blobs(rows=8, features=5, dtype=torch.float64):
    """A batch (x, y)."""
    return torch.randn(rows, features, dtype=dtype), torch.randint(0, CLASSES, (rows,))


def run_step(engine, model, batch, loss_of=F.cross_entropy, **options):
    """One forward and backward pass through an attached engine; returns the loss."""
    with engine.training_step(batch, **options):
        loss = loss_of(model(batch[0]), batch[1])
    engine.backward(loss)
    return loss.detach()


def train(engine, model, optimizer, batches, before=lambda engine, step: None):
    """A whole run in a fresh `with engine:` block; returns the losses."""
    losses = []
    with engine:
        for step, batch in enumerate(batches):
            before(engine, step)
            optimizer.zero_grad()
            losses.append(run_step(engine, model, batch))
            optimizer.step()
            engine.update_estimators()
    return losses


def update(engine, model, user, batches):
    """One step of the user's optimizer on `batches`, whose losses are averaged."""
    user.zero_grad()
    losses = []
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1
        with engine.training_step((x, y), accumulate=len(batches), first=i == 0, last=last):
            loss = F.cross_entropy(model(x), y)
        engine.backward(loss / len(batches))
        losses.append(loss.detach())
    user.step()
    engine.update_estimators()
    return losses


def attached(model, boundaries, estimator=Told, **options):
    """An attached engine, for tests whose model is thrown away."""
    engine = DNIEngine(model, boundaries, estimator, **options)
    engine.attach()
    return engine


def grads(module):
    """`.grad` by name, copied."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def weights(module):
    """Parameters and buffers by name, copied."""
    return {n: t.clone() for n, t in module.state_dict().items()}


def same_bits(a, b):
    """Whether two dictionaries of tensors (or None) are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[n] is b[n] if a[n] is None or b[n] is None else torch.equal(a[n], b[n]) for n in a
    )


def assert_close(a, b, atol=1e-12):
    """Two dictionaries of tensors (or None) agree, None only with None."""
    assert a.keys() == b.keys()
    for n in a:
        assert (a[n] is None) == (b[n] is None), n
        if a[n] is not None:
            torch.testing.assert_close(a[n], b[n], rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


@contextmanager
def unchecked():
    """Arguments of a wrong type get as far as they do outside of these tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
