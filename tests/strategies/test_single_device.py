"""DNIStrategy in real fits: when gradients arrive, what a step may be, in which precision."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    CLASSES,
    FEATURES,
    Net,
    different,
    dni,
    fit,
    loader,
    net,
    weights,
)
from torch.utils.data import DataLoader

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LocalLossEstimator, MLPEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
LOCAL = partial(LocalLossEstimator, num_classes=CLASSES)
"""An estimator whose gradient is not zero at the first step."""


def lower(module):
    """Parameters below the last boundary."""
    return [p for stage in module.net[:2] for p in stage.parameters()]


def first_batches(count):
    return loader(rows=8 * count)


# ---- gradients arrive where Lightning looks for them


class Seen(pl.Callback):
    """Gradients of the lowest weight at the hooks where users look at them."""

    def __init__(self):
        self.at = {"on_after_backward": [], "on_before_optimizer_step": []}

    def on_after_backward(self, trainer, module):
        self._note("on_after_backward", module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self._note("on_before_optimizer_step", module)

    def _note(self, hook, module):
        grad = module.net[0][0].weight.grad
        self.at[hook].append(None if grad is None else grad.clone())


def test_lightnings_zero_grad_between_forward_and_backward_wipes_nothing():
    module, seen = net(), Seen()
    zeroed = []

    class Zeroed(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            zeroed.append(trainer.global_step)

    before = weights(module)
    fit(module, dni(estimator=LOCAL), first_batches(3), callbacks=[seen, Zeroed()])
    assert zeroed == [0, 1, 2]
    # zero at the start, the heads have learnt after the first step
    assert all(bool(g.any()) for g in seen.at["on_before_optimizer_step"][1:])
    assert "net.0.0.weight" in different(before, weights(module))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_merged_before_the_first_hook_that_may_look_at_them(accumulate):
    seen = Seen()
    fit(net(), dni(estimator=LOCAL), first_batches(4), callbacks=[seen], accumulate_grad_batches=accumulate)
    at_step = seen.at["on_before_optimizer_step"]
    after = seen.at["on_after_backward"]
    assert (len(after), len(at_step)) == (4, 4 // accumulate)
    for i, grad in enumerate(at_step):
        assert torch.equal(after[(i + 1) * accumulate - 1], grad)
    assert bool(at_step[-1].any())


def test_accumulated_gradients_are_the_mean_over_the_window():
    """Two halves of a batch, accumulated, give what the whole batch gives."""
    halves, whole = Seen(), Seen()
    estimators = dni(estimator=LOCAL), dni(estimator=LOCAL)
    fit(net(), estimators[0], loader(32, 8), callbacks=[halves], accumulate_grad_batches=2)
    fit(net(), estimators[1], loader(32, 16), callbacks=[whole])
    for a, b in zip(halves.at["on_before_optimizer_step"], whole.at["on_before_optimizer_step"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(*(s.engine.estimators["net.0"].parameters() for s in estimators), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class ZeroesItself(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        for p in self.parameters():
            p.grad = None


class NeverZeroes(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize("kind", [ZeroesItself, NeverZeroes])
def test_a_users_own_zero_grad_means_what_it_means_without_us(kind):
    trained = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        torch.manual_seed(0)
        module = kind()
        fit(module, strategy)
        trained.append(weights(module))
    assert different(*trained) == []


def test_a_users_own_zero_grad_does_not_wipe_synthetic_gradients():
    torch.manual_seed(0)
    module, twin = ZeroesItself(), net()
    fit(module, dni(estimator=LOCAL))
    fit(twin, dni(estimator=LOCAL))
    assert different(weights(module), weights(twin)) == []


def test_hooks_on_parameters_see_each_gradient_once_as_under_wandb_watch():
    module, seen, applied = net(), [], Seen()
    module.net[0][0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    fit(module, dni(estimator=LOCAL), callbacks=[applied])
    assert len(seen) == 10
    assert all(map(torch.equal, seen, applied.at["on_before_optimizer_step"]))


def test_clipping_bounds_all_gradients_together():
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            norms.extend([torch.stack([g.norm() for g in grads]).norm().item()] if grads else [])
            self.lower_is_there = any(bool(p.grad.any()) for p in lower(module) if p.grad is not None)

    callback = Norm()
    fit(net(), dni(estimator=LOCAL), callbacks=[callback], gradient_clip_val=0.01)
    assert callback.lower_is_there
    assert len(norms) == 9
    assert norms == pytest.approx([0.01] * 9, rel=1e-3)


def test_hooks_of_a_step_fire_in_lightnings_order():
    def order(strategy):
        events = []
        names = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
                 "on_before_optimizer_step", "on_train_batch_end"]  # fmt: skip
        note = {name: lambda self, *args, name=name: events.append(name) for name in names}
        fit(net(), strategy, callbacks=[type("Order", (pl.Callback,), note)()], accumulate_grad_batches=2)
        return events

    assert order(dni()) == order("auto")


# ---- what a training step may be


class ReturnsNone(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_returns_none_is_skipped_as_without_us(accumulate):
    trained = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        torch.manual_seed(0)
        module = ReturnsNone()
        fit(module, strategy, accumulate_grad_batches=accumulate)
        trained.append(weights(module))
    assert different(*trained) == []


def test_a_step_that_returns_none_teaches_the_estimators_nothing():
    class Never(Net):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, strategy = Never(), dni(estimator=LOCAL)
    before = weights(module)
    fit(module, strategy)
    assert different(before, weights(module)) == []
    assert not any(bool(p.any()) for e in strategy.engine.estimators.values() for p in e.parameters())


class ReturnsDict(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": batch_idx}


def test_a_step_may_return_a_dict():
    torch.manual_seed(0)
    module, twin = ReturnsDict(), net()
    fit(module, dni())
    fit(twin, dni())
    assert different(weights(module), weights(twin)) == []


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


BATCHES = {
    "tuple": (tuple, lambda b: b),
    "list": (list, lambda b: b),
    "dict": (lambda b: {"image": b[0], "label": b[1]}, lambda b: (b["image"], b["label"])),
    "dict, labels first": (lambda b: {"y": b[1], "x": b[0]}, lambda b: (b["x"], b["y"])),
    "namedtuple": (lambda b: Pair(*b), lambda b: b),
    "dataclass": (lambda b: Sample(*b), lambda b: (b.x, b.y)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_labels_are_found_in_any_kind_of_batch(kind):
    pack, unpack = BATCHES[kind]

    class Packed(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(unpack(batch), batch_idx)

    def collate(samples):
        return pack(torch.utils.data.default_collate(samples))

    torch.manual_seed(0)
    module, twin = Packed(), net()
    fit(module, dni(), loader(collate_fn=collate))
    fit(twin, dni())
    assert different(weights(module), weights(twin)) == []


def test_a_batch_without_labels_is_refused_where_the_estimator_needs_them():
    class Alone(Net):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    with pytest.raises(EstimatorError, match="Pass `labels=`"):
        fit(Alone(), dni(), DataLoader(torch.randn(16, FEATURES), 8))
