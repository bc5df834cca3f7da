"""Every precision trains as the hand-written loop of that precision does; estimators stay out of it."""

import copy
from itertools import pairwise

import pytest
import torch
from fits import (
    CLASSES,
    FEATURES,
    LINEAR,
    AtBatchEnd,
    AtBatchStart,
    Losses,
    Net,
    different,
    dni,
    fit,
    loader,
    net,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F

from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.estimators import LocalLossEstimator, MLPEstimator, ZeroEstimator

ESTIMATORS = {
    "linear": LINEAR,
    "mlp": lambda spec: MLPEstimator(spec, hidden_sizes=(8,), num_classes=CLASSES),
    "local_loss": lambda spec: LocalLossEstimator(spec, num_classes=CLASSES),
}
FINEST = {"rtol": 1e-6, "atol": 1e-7}


def half(scaler=None, **options):
    """What Trainer(precision="16-mixed") does on a GPU: there, Lightning quietly turns it into bfloat16."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler), **options}


def scaler(init_scale=1024.0, growth_interval=3):
    return GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)


class Written:
    """The loop that a user of autocast and a scaler would write for one boundary, `net.1`."""

    def __init__(self, module, dtype, scaler=None, bp_lambda=0.0):
        self.below, self.above = nn.Sequential(module.net[0], module.net[1]), module.net[2]
        self.optimizer = module.configure_optimizers()
        self.estimator = LINEAR(BoundarySpec("net.1", (LeafSpec((8,), dtype),)))
        self.learner = torch.optim.Adam(self.estimator.parameters(), lr=1e-3)
        self.dtype, self.scaler, self.bp_lambda = dtype, scaler or GradScaler("cpu", enabled=False), bp_lambda
        self.skipped = 0

    def step(self, x, y):
        rows, scale = len(x), self.scaler.get_scale()
        with torch.autocast("cpu", self.dtype):
            h = self.below(x)
            leaf = h.detach().requires_grad_()
            loss = F.cross_entropy(self.above(leaf), y)
        (synthetic,), _ = self.estimator.synthesize((leaf.detach().float(),), y, None)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        applied = (synthetic.detach() * (scale / rows)).to(h.dtype)
        lam = self.bp_lambda
        h.backward(applied if lam == 0.0 else applied * (1 - lam) + leaf.grad * lam)
        target = leaf.grad.float() * (rows / scale)
        self.learner.zero_grad()
        (
            F.mse_loss(
                self.estimator.map(leaf.detach().float()) + self.conditioned(y), target, reduction="sum"
            )
            / rows
        ).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            self.skipped += 1
        else:
            self.learner.step()

    def conditioned(self, y):
        return self.estimator.conditioning.weight[y]


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("init_scale", [1.0, 1024.0, 2.0**30])
def test_16_mixed_is_the_loop_that_one_would_write(init_scale, bp_lambda):
    """Scales of 2**30 overflow: the network's step and the estimator's are skipped together."""
    module, twin = net(), net()
    strategy = dni(boundaries=["net.1"], bp_lambda=bp_lambda)
    fit(module, strategy, max_epochs=3, **half(scaler(init_scale)))
    written = Written(twin, torch.float16, scaler(init_scale), bp_lambda)
    for _ in range(3):
        for batch in loader():
            written.step(*batch)
    assert written.skipped > 0 if init_scale > 1e6 else written.skipped == 0
    torch.testing.assert_close(weights(module), weights(twin), **FINEST)
    estimator = strategy.engine.estimators["net.1"]
    torch.testing.assert_close(weights(estimator), weights(written.estimator), **FINEST)
    assert different(weights(net()), weights(module)) != []
    assert strategy.precision_plugin.scaler.get_scale() == written.scaler.get_scale()


def test_bf16_mixed_is_the_loop_that_one_would_write():
    module, twin = net(), net()
    strategy = dni(boundaries=["net.1"])
    fit(module, strategy, max_epochs=3, precision="bf16-mixed")
    written = Written(twin, torch.bfloat16)
    for _ in range(3):
        for batch in loader():
            written.step(*batch)
    torch.testing.assert_close(weights(module), weights(twin), **FINEST)


@pytest.mark.parametrize("bp_lambda", [0.0, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_estimators_step_with_the_networks(fused, bp_lambda):
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2, fused=fused)

    torch.manual_seed(0)
    module, seen = Fused(), []

    def look(trainer, module, batch_idx):
        engine = trainer.strategy.engine
        state = [weights(module), *(weights(e) for e in engine.estimators.values())]
        seen.append((copy.deepcopy(state), dict(engine.skipped)))

    strategy = dni(bp_lambda=bp_lambda)
    fit(module, strategy, callbacks=[AtBatchEnd(look)], max_steps=4, **half(scaler(2.0**60)))
    for (before, _), (after, skipped) in pairwise(seen):
        assert all(different(a, b) == [] for a, b in zip(before, after, strict=True))
        assert skipped["net.1"] > 0


@pytest.mark.parametrize(
    "clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_clipping_sees_unscaled_gradients(clip):
    """The scale is a power of two, so that nothing but the scaling itself can make a difference."""
    found = []
    for init_scale in (1.0, 256.0):
        module = net()
        fit(module, dni(), **half(scaler(init_scale, growth_interval=10**6), **clip))
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    unclipped = net()
    fit(unclipped, dni(), **half(scaler(1.0)))
    assert (unclipped.net[2].weight - found[0]["net.2.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", pytest.param("half", id="16-mixed")]
)
def test_backprop_through_the_cuts_is_the_plain_trainer_bit_for_bit(precision):
    weights_of = []
    for strategy in (dni(bp_lambda=1.0), "auto"):
        module = net()
        asked = half(scaler()) if precision == "half" else {"precision": precision}
        fit(module, strategy, max_epochs=2, **asked)
        weights_of.append(weights(module))
    assert different(*weights_of) == []
    assert different(weights(net()), weights_of[0]) != []


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "half"])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_estimators_run_and_learn_in_float32(kind, precision):
    seen = []

    def look(trainer, module, batch_idx):
        estimator = trainer.strategy.engine.estimators["net.0"]
        seen.append({t.dtype for t in [*estimator.parameters(), *estimator.buffers()]} - {torch.int64})
        report = trainer.strategy.engine.last_report.boundaries["net.0"]
        seen.append({report.synthetic.dtype, report.target.dtype, report.loss.dtype})

    request = AtBatchStart(lambda trainer, module, batch_idx: trainer.strategy.engine.request_report())
    module, strategy = net(), dni(estimator=ESTIMATORS[kind])
    asked = half(scaler()) if precision == "half" else {"precision": precision}
    fit(module, strategy, callbacks=[request, AtBatchEnd(look)], max_epochs=2, **asked)
    assert all(dtypes == {torch.float32} for dtypes in seen)
    assert len(seen) == 40
    assert any(p.any() for p in strategy.engine.estimators["net.0"].parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precision_trains_close_to_float32(precision):
    final = {}
    for each in ("32-true", precision):
        losses = Losses()
        fit(net(), dni(estimator=ESTIMATORS["local_loss"]), callbacks=[losses], precision=each, max_epochs=3)
        final[each] = torch.tensor(losses.train)
    torch.testing.assert_close(final[precision], final["32-true"], rtol=0.05, atol=0.05)


def test_under_bf16_true_the_network_is_bfloat16_and_zero_estimators_move_nothing_below():
    module = net()
    fit(module, dni(estimator=ZeroEstimator), precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    changed = different({k: v.bfloat16() for k, v in weights(net()).items()}, weights(module))
    assert changed == ["net.2.weight", "net.2.bias"]


def test_under_float64_the_estimators_are_float64():
    strategy = dni()
    fit(net(), strategy, precision="64-true")
    assert {p.dtype for e in strategy.engine.estimators.values() for p in e.parameters()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_other_precisions_are_refused_by_name():
    with pytest.raises(MisconfigurationException, match=r"Expected a precision of .* but got '16-true'"):
        fit(net(), dni(), precision="16-true")


def test_a_scale_changes_no_synthetic_gradient_and_no_lesson():
    """In float64, where a scale costs no digit."""
    from lightning_dni.core import DNIEngine

    x, y = torch.randn(8, FEATURES, dtype=torch.float64), torch.arange(8) % CLASSES
    learnt = []
    for scale in (None, torch.tensor(4096.0, dtype=torch.float64)):
        module = net().double()
        engine = DNIEngine(module, ["net.0", "net.1"], LINEAR, seed=0)
        with engine:
            for _ in range(3):
                module.zero_grad()
                with engine.training_step((x, y), scale=scale):
                    loss = F.cross_entropy(module(x), y)
                engine.backward(loss if scale is None else loss * scale)
                engine.update_estimators()
        gradients = {n: p.grad / (1.0 if scale is None else scale) for n, p in module.named_parameters()}
        learnt.append((gradients, {n: dict(e.state_dict()) for n, e in engine.estimators.items()}))
    torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-12, atol=1e-12)
