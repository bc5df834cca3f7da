"""At lambda 0 no more than the largest stage is alive for backward, where backprop keeps them all."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, run_step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import LinearEstimator, LocalLossEstimator, ZeroEstimator


class Meter:
    """Bytes alive of what autograd has saved and of what modules have passed on, by storage.

    Nothing is kept alive by it: it has weak references to storages. It looks whenever something
    is added, which is the only moment at which a new peak can arise. Parameters, buffers and the
    batch do not count.

    Args:
        modules: Gives the modules whose parameters and buffers do not count.
        passed_on: Modules whose outputs count, as those above receive them.
        batch: The user's tensors.
    """

    def __init__(self, modules, passed_on, batch):
        self.modules, self.passed_on, self.batch = modules, passed_on, batch
        self.storages, self.peak = {}, 0

    def __enter__(self):
        self.hooks = [m.register_forward_hook(lambda module, args, h: self.add(h)) for m in self.passed_on]
        self.saving = torch.autograd.graph.saved_tensors_hooks(lambda h: self.add(h).detach(), lambda h: h)
        self.saving.__enter__()
        return self

    def __exit__(self, *error):
        self.saving.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def add(self, h):
        storage = h.untyped_storage()
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return h

    def alive(self):
        own = [t for m in self.modules() for t in (*m.parameters(), *m.buffers())]
        apart = {t.untyped_storage()._cdata for t in (*own, *self.batch)}
        self.storages = {k: s for k, s in self.storages.items() if not s[0].expired()}
        return sum(size for k, (_, size) in self.storages.items() if k not in apart)


def perceptron(depth=16):
    stages = [nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*stages, nn.Linear(32, CLASSES))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        make = lambda: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.first, self.second = make(), make()

    def forward(self, x):
        return (x + self.second(self.first(x).relu())).relu()


def bare(depth=16):
    stages = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*stages, nn.Linear(32, CLASSES))


def convolutional():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return nn.Sequential(*(Block(4) for _ in range(12)), head)


NETS = {
    "16-stage MLP": (perceptron, (512, 32)),
    "16-stage MLP without batch norm": (bare, (512, 32)),
    "12-block CNN": (convolutional, (32, 4, 12, 12)),
}
ESTIMATORS = {
    "zero": ZeroEstimator,
    "linear": partial(LinearEstimator, num_classes=CLASSES),
    "local loss": partial(LocalLossEstimator, num_classes=CLASSES),
}


def batch_for(shape):
    return torch.randn(shape), torch.randint(0, CLASSES, shape[:1])


def largest_stage(model, batch):
    """Bytes that one stage alone keeps from its input to its output, both included, at most."""
    h, sizes = batch[0], []
    for stage in model[:-1]:
        h = h.detach().clone().requires_grad_()
        with Meter(lambda: [model], [stage], ()) as meter:
            meter.add(h)
            h = stage(h)
        sizes.append(meter.peak)
    return max(sizes)


def backprop_peak(model, batch):
    with Meter(lambda: [model], list(model[:-1]), batch) as meter:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    return meter.peak


def engine_peak(model, batch, estimator, steps=2, **options):
    engine = DNIEngine(model, [str(k) for k in range(len(model) - 1)], estimator, **options)
    modules = lambda: [model, *engine.estimators.values()]
    with engine:
        for _ in range(steps):  # estimators that have learnt something keep more than those at zero
            with Meter(modules, list(model[:-1]), batch) as meter:
                run_step(engine, model, batch)
            engine.update_estimators()
    return meter


def test_the_meter_counts_what_backprop_saves():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid()), torch.randn(16, 8)
    with Meter(lambda: [model], [], [x]) as meter:
        out = model(x)
        assert (
            meter.alive() == 2 * 16 * 8 * 4
        )  # the two sigmoids' outputs, one of which a linear layer saves too
        out.sum().backward()
        del out
    assert meter.alive() == 0
    assert meter.peak == 2 * 16 * 8 * 4


def test_the_meter_counts_a_storage_once_and_boundary_tensors_too():
    x = torch.randn(16, 8, requires_grad=True)
    with Meter(list, [identity := nn.Identity()], ()) as meter:
        kept = identity(x * 1)
        again = kept.view(8, 16).sigmoid() + kept.square().sum()
        assert meter.alive() == 2 * 16 * 8 * 4
        assert again.requires_grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("net", NETS)
def test_the_peak_is_that_of_the_largest_stage(net, estimator):
    make, shape = NETS[net]
    model, batch = make(), batch_for(shape)
    largest, all_of_it = largest_stage(model, batch), backprop_peak(model, batch)
    meter = engine_peak(model, batch, ESTIMATORS[estimator])
    assert all_of_it > 8 * largest / 1.5
    assert meter.peak <= 1.5 * largest
    assert meter.alive() == 0


def test_the_peak_does_not_grow_with_depth():
    batch = batch_for((512, 32))
    peaks = [engine_peak(perceptron(depth), batch, ESTIMATORS["linear"]).peak for depth in (4, 16)]
    assert peaks[0] == peaks[1]


def test_full_lambda_keeps_no_more_than_backprop():
    model, batch = perceptron(), batch_for((512, 32))
    plain = backprop_peak(model, batch)
    assert engine_peak(model, batch, ESTIMATORS["zero"], bp_lambda=1.0).peak <= 1.01 * plain
