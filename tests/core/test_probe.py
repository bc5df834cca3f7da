"""The true gradient is plain backprop's, and measuring it changes no number of the run."""

import copy

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    VECTOR_ESTIMATORS,
    assert_close,
    attached,
    blobs,
    mlp,
    run_step,
    weights,
)
from oracles import plain_gradients
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import StageError
from lightning_dni.estimators import BackpropEstimator, ZeroEstimator

WIDTHS = (5, 6, 7, 6, CLASSES)
KINDS = {"0": VECTOR_ESTIMATORS["mlp"], "1": VECTOR_ESTIMATORS["linear"], "2": VECTOR_ESTIMATORS["critic"]}
NAMES = ["0", "1", "2"]


def trained(seed=0, steps=5, bp_lambda=0.0, estimator=KINDS):
    """A net with dropout and batch norm, whose estimators have learnt something."""
    torch.manual_seed(seed)
    model = mlp(WIDTHS, dropout=0.3, batch_norm=True)
    engine = attached(model, NAMES, estimator, bp_lambda=bp_lambda)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        run_step(engine, model, blobs())
        optimizer.step()
        engine.update_estimators()
    model.zero_grad()
    return engine, model


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_true_gradients_are_those_of_plain_backprop(bp_lambda, accumulate, scale):
    engine, model = trained(bp_lambda=bp_lambda)
    twin, (x, y) = copy.deepcopy(model), blobs()
    torch.manual_seed(5)
    engine.request_probe()
    factor = (1.0 if scale is None else scale) / accumulate
    run_step(
        engine,
        model,
        (x, y),
        lambda out, y: F.cross_entropy(out, y) * factor,
        accumulate=accumulate,
        scale=None if scale is None else torch.tensor(scale),
    )
    torch.manual_seed(5)
    _, true = plain_gradients(twin, x, lambda out: F.cross_entropy(out, y) * factor, NAMES)
    for name, report in engine.last_report.boundaries.items():
        torch.testing.assert_close(report.true, true[name] * len(x) / factor, rtol=0, atol=1e-13)
        stage = {n: p.grad for n, p in twin.named_parameters() if n.startswith(name)}
        assert_close(dict(report.true_weights), stage, atol=1e-13 * factor)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_applied_weight_gradients_are_those_applied(bp_lambda):
    engine, model = trained(bp_lambda=bp_lambda)
    engine.request_probe()
    run_step(engine, model, blobs())
    for name, report in engine.last_report.boundaries.items():
        stage = {n: p.grad for n, p in model.named_parameters() if n.startswith(name)}
        assert stage.keys() == report.applied_weights.keys()
        assert_close(dict(report.applied_weights), stage, atol=0)


def run(bp_lambda, estimator, before, steps=6):
    torch.manual_seed(1)
    model = mlp(WIDTHS, dropout=0.3, batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses, reports = [], 0
    engine = DNIEngine(model, NAMES, estimator, bp_lambda=bp_lambda)
    with engine:
        for step in range(steps):
            optimizer.zero_grad()
            before(engine, step)
            losses.append(run_step(engine, model, blobs()))
            reports += engine.last_report is not None
            optimizer.step()
            engine.update_estimators()
    state = {f"{n}.{k}": t for n, e in engine.estimators.items() for k, t in weights(e).items()}
    state.update(weights(model), rng=torch.get_rng_state(), losses=torch.stack(losses))
    return state, reports


def never(engine, step):
    pass


def probe_each(engine, step):
    engine.request_probe()


def alternate(engine, step):
    (engine.request_probe if step % 3 == 0 else engine.request_report)() if step % 2 == 0 else None


@pytest.mark.parametrize("before", [probe_each, alternate])
@pytest.mark.parametrize("estimator", [KINDS, ZeroEstimator, VECTOR_ESTIMATORS["local_loss"]])
@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_probes_and_reports_change_no_bit_of_a_run(bp_lambda, estimator, before):
    plain, none = run(bp_lambda, estimator, never)
    watched, reports = run(bp_lambda, estimator, before)
    assert (none, reports) == (0, 6 if before is probe_each else 3)
    assert plain.keys() == watched.keys()
    assert [n for n in plain if not torch.equal(plain[n], watched[n])] == []


def test_zero_estimators_are_probed_to_the_bottom():
    model, (x, y) = mlp(WIDTHS), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, NAMES, ZeroEstimator)
    engine.request_probe()
    run_step(engine, model, (x, y))
    _, true = plain_gradients(twin, x, lambda out: F.cross_entropy(out, y), NAMES)
    for name, report in engine.last_report.boundaries.items():
        torch.testing.assert_close(report.true, true[name] * 8, rtol=0, atol=1e-14)
        assert not report.synthetic.any()
        assert report.applied_weights == {}
    assert model[0][0].weight.grad is None


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.head = mlp((5, 6, 4)), nn.Linear(4, CLASSES).double()

    def forward(self, x):
        return self.head(self.tower(x) * self.tower(-x))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_every_call_of_a_shared_module_is_probed(bp_lambda):
    model, (x, y) = Siamese(), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, ["tower.0", "tower.1"], bp_lambda=bp_lambda)
    engine.request_probe()
    run_step(engine, model, (x, y))
    _, true = plain_gradients(twin, x, lambda out: F.cross_entropy(out, y), ["tower.0", "tower.1"])
    for name, report in engine.last_report.boundaries.items():
        torch.testing.assert_close(report.true, true[name] * 8, rtol=0, atol=1e-14)
        stage = {n: p.grad for n, p in twin.named_parameters() if n.startswith(name)}
        assert_close(dict(report.true_weights), stage, atol=1e-14)


class OnceOnly(torch.autograd.Function):
    """Frees what it needs in its first backward pass, as some fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.buffer = [x.detach()]
        return x * 2

    @staticmethod
    def backward(ctx, g):
        if not ctx.buffer:
            raise RuntimeError("the buffer has been freed")
        ctx.buffer.clear()
        return g * 2


class Fused(nn.Module):
    def forward(self, x):
        return OnceOnly.apply(x)


def test_a_stage_that_cannot_be_replayed_is_refused_on_probe_steps_only():
    model, batch = nn.Sequential(nn.Linear(5, 6).double(), Fused(), nn.Linear(6, CLASSES).double()), blobs()
    engine = attached(model, ["1"])
    run_step(engine, model, batch)
    engine.request_probe()
    with pytest.raises(StageError, match=r"boundary '1' to be differentiable twice.*buffer has been"):
        run_step(engine, model, batch)


def test_a_probe_keeps_nothing_of_the_graph():
    import weakref

    model, batch, seen = mlp(WIDTHS), blobs(), []
    for stage in model:
        stage.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    engine = attached(model, NAMES)
    for _ in range(2):
        engine.request_probe()
        run_step(engine, model, batch)
        assert all(ref() is None for ref in seen)
    report = engine.last_report.boundaries["0"]
    assert not any(t.requires_grad for t in (report.true, report.synthetic, report.target))


class Uncast(nn.Module):
    """A linear layer that runs in full precision whatever is around it."""

    def __init__(self, *size):
        super().__init__()
        self.layer = nn.Linear(*size)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.layer(x)


def test_under_autocast_backprop_is_still_what_is_measured():
    """As in manual optimization, where the backward pass is inside of it."""
    torch.manual_seed(0)
    model = nn.Sequential(Uncast(5, 16), Uncast(16, 16), Uncast(16, CLASSES))
    engine, (x, y) = attached(model, ["0", "1"], BackpropEstimator), blobs(dtype=torch.float32)
    engine.request_probe()
    with torch.autocast("cpu", torch.bfloat16), engine.training_step((x, y)):
        engine.backward(F.cross_entropy(model(x), y))
    for report in engine.last_report.boundaries.values():
        assert torch.equal(report.synthetic, report.true)
        for name, gradient in report.true_weights.items():
            assert torch.equal(report.applied_weights[name], gradient)
