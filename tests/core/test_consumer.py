"""The layers that read an activation give it an estimator's vector-Jacobian product, and only they do."""

import copy
import warnings
import weakref

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, mlp, run_step, same_bits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dni.core import DNIEngine
from lightning_dni.core.consumer import input_gradient
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import BackpropEstimator, FeedbackAlignmentEstimator, LinearEstimator

WIDTHS, NAMES = (5, 6, 7, 8, CLASSES), ["0", "1", "2"]


class OwnWeights(FeedbackAlignmentEstimator.__base__):
    """Sends back through the layer's own weight, by the way of feedback alignment: that is backprop."""

    needs, locks = FeedbackAlignmentEstimator.needs, FeedbackAlignmentEstimator.locks
    relays = True

    def __init__(self, spec):
        super().__init__()

    def synthesize(self, h, context, state):
        return None, None

    def correct(self, record, feedback):
        return feedback.target

    def pull_back(self, name, consumer, x, gradient):
        return input_gradient(consumer, consumer.weight.detach().to(gradient.dtype), x, gradient)


def fa(model, names=NAMES, **options):
    return attached(model, names, FeedbackAlignmentEstimator, **options)


def conv_net(**options):
    """A convolution of some kind reads a map."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.Tanh()),
        nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)),
    ).double()


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "groups": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular", "bias": False},
    ],
    ids=str,
)
def test_with_the_own_weights_it_is_backprop_for_every_convolution(options):
    model, batch = conv_net(**options), (torch.randn(4, 2, 9, 8).double(), torch.randint(CLASSES, (4,)))
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0", "1"], OwnWeights), model, batch)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    assert_close(grads(model), grads(twin))


class Block(nn.Module):
    """Two layers read one activation, and what they make is read by a third."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 6)

    def forward(self, h):
        h = self.norm(h)
        return self.out(self.key(h).tanh() * self.query(h).relu())


def blocks():
    return nn.Sequential(nn.Linear(5, 6), Block(), nn.Linear(6, CLASSES)).double()


def test_every_layer_that_reads_the_activation_is_swapped_and_no_other():
    """A norm lies between; the layer behind them stays as it is and is named."""
    model, batch = blocks(), blobs()
    twin = copy.deepcopy(model)
    engine = fa(model, ["0", "1"])
    with pytest.warns(UserWarning, match=r"passes exactly through \['1.out'\].*hybrid with backprop"):
        run_step(engine, model, batch)
    drawn = [e.matrices.drawn for e in engine.estimators.values()]
    assert [sorted(d) for d in drawn] == [["1.key", "1.query"], ["2"]]
    h = twin[0](batch[0])
    x = twin[1].norm(h)
    key, query = twin[1].key(x.detach()), twin[1].query(x.detach())
    out = twin[1].out(key.tanh() * query.relu())
    scores = twin[2](out.detach())
    F.cross_entropy(scores, batch[1]).backward()
    (error,) = torch.autograd.grad(
        F.cross_entropy(again := scores.detach().requires_grad_(), batch[1]), again
    )
    out.backward(error @ drawn[1]["2"], retain_graph=True)
    at_key, at_query = torch.autograd.grad(out, (key, query), error @ drawn[1]["2"])
    x.backward(at_key @ drawn[0]["1.key"] + at_query @ drawn[0]["1.query"])
    assert_close(grads(model), grads(twin))


# ---- proper or hybrid


def said_of(engine):
    return engine.describe()["feedback_alignment"]


def test_it_is_proper_where_every_layer_reads_a_boundary():
    model, batch = mlp(WIDTHS), blobs()
    engine = fa(model)
    assert said_of(engine) == "known after the first step"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_step(engine, model, batch)
    assert said_of(engine) == "proper"


def test_a_hybrid_is_told_once_with_the_layers_that_are_exact():
    model, batch = mlp(WIDTHS), blobs()
    engine = fa(model, ["1"])
    with pytest.warns(UserWarning, match=r"exactly through \['1.0', '3'\]"):
        run_step(engine, model, batch)
    assert said_of(engine) == "hybrid, exact through ['1.0', '3']"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_step(engine, model, batch)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, h):
        return h + self.map(h)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.map = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)

    def forward(self, h):
        return self.map(h @ self.weight)


@pytest.mark.parametrize(
    ("middle", "match"),
    [
        (Residual, r"\['a way from 0 that meets no layer'\]"),
        (Functional, r"\['a weight of shape \(6, 6\) before 1.map'\]"),
    ],
)
def test_what_goes_round_the_layers_is_told(middle, match):
    model = nn.Sequential(nn.Linear(5, 6), middle(), nn.Linear(6, CLASSES)).double()
    with pytest.warns(UserWarning, match=match):
        run_step(fa(model, ["0", "1"]), model, blobs())


def test_layers_above_other_estimators_are_not_told_of():
    model, batch = mlp(WIDTHS), blobs()
    factories = {"1": FeedbackAlignmentEstimator, "*": LinearEstimator}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_step(attached(model, NAMES, factories), model, batch)


def test_an_activation_that_no_layer_reads_is_refused():
    class Product(nn.Module):
        def forward(self, h):
            return h[:, :CLASSES]

    model = nn.Sequential(nn.Linear(5, 6), Product()).double()
    with pytest.raises(EstimatorError, match=r"read the output of boundary '0' for Feedback.*but none did"):
        run_step(fa(model, ["0"]), model, blobs())


# ---- whatever a step is


def test_a_function_may_make_the_estimator():
    found = []
    for factory in (FeedbackAlignmentEstimator, lambda spec: FeedbackAlignmentEstimator(spec)):
        torch.manual_seed(0)
        model, batch = mlp(WIDTHS), blobs()
        run_step(attached(model, NAMES, factory), model, batch)
        found.append(grads(model))
    assert same_bits(*found)


def test_a_probe_measures_the_true_gradient_and_changes_nothing():
    """At the top boundary, too, where the loss itself came back through the fixed matrix."""
    model, batch = mlp(WIDTHS), blobs()
    engine = fa(model, ["0", "1", "2.0"])
    run_step(engine, model, batch)
    before = grads(model)
    model.zero_grad()
    engine.request_probe()
    run_step(engine, model, batch)
    assert same_bits(grads(model), before)
    hs, h = [], batch[0]
    for layer in (model[0], model[1], model[2][0], nn.Sequential(model[2][1], model[3])):
        h = layer(h)
        hs.append(h)
    true = torch.autograd.grad(F.cross_entropy(hs[-1], batch[1], reduction="sum"), hs[:-1])
    for report, expected in zip(engine.last_report.boundaries.values(), true, strict=True):
        torch.testing.assert_close(report.true, expected, rtol=0, atol=1e-12)
        assert not torch.allclose(report.synthetic, expected)


def test_nothing_of_the_graph_is_kept():
    model, batch, seen = mlp(WIDTHS), blobs(), []
    for stage in model:
        stage.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    engine = fa(model)
    for probe in (False, True, False):
        if probe:
            engine.request_probe()
        run_step(engine, model, batch)
        assert all(ref() is None for ref in seen)


class Checkpointed(nn.Module):
    def __init__(self, inner, enabled):
        super().__init__()
        self.inner, self.enabled = inner, enabled

    def forward(self, h):
        return checkpoint(self.inner, h, use_reentrant=False) if self.enabled else self.inner(h)


@pytest.mark.parametrize("probe", [False, True])
def test_an_activation_checkpoint_around_the_layer_changes_nothing(probe):
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(Checkpointed(stage, enabled) for stage in mlp(WIDTHS)))
        engine = fa(model)
        if probe:
            engine.request_probe()
        run_step(engine, model, blobs())
        reports = engine.last_report.boundaries.items() if probe else ()
        found.append(grads(model) | {f"true {name}": report.true for name, report in reports})
    assert same_bits(*found)


def test_autocast():
    """What comes back is of the precision of what the layer read, and near to that of full precision."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, batch = mlp(WIDTHS, dtype=torch.float32), blobs(dtype=torch.float32)
        engine = fa(model)
        with engine.training_step(batch), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        engine.backward(loss)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append(grads(model))
    assert_close(*found, atol=2e-2)


def test_the_layers_are_hooked_only_while_it_is_asked_for():
    def hooks(model):
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]

    model, batch = mlp(WIDTHS), blobs()
    with DNIEngine(model, NAMES, Told) as engine:
        run_step(engine, model, batch)
        assert sum(hooks(model)) == len(NAMES) + 1
    with DNIEngine(model, NAMES, FeedbackAlignmentEstimator) as engine:
        run_step(engine, model, batch)
        output = model(batch[0])  # outside of a step they do nothing
        copy.deepcopy(model)(batch[0])
        assert output.grad_fn is not None
        assert sum(hooks(model)) == len(NAMES) + 1 + 2 * 4
    assert not any(hooks(model))


def test_a_user_may_go_on_with_what_a_layer_has_made_in_place():
    """No view of it is handed on."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 6), nn.Linear(6, 7), nn.ReLU(inplace=inplace), nn.Linear(7, CLASSES)
        ).double()
        run_step(fa(model, ["0", "2"]), model, blobs())
        found.append(grads(model))
    assert same_bits(*found)


def test_backprop_by_the_same_way_is_equal_to_the_bit():
    """For any number of rows: what arrives is handed on as it came."""
    model, batch = mlp(WIDTHS, dropout=0.3, dtype=torch.float32), blobs(rows=7, dtype=torch.float32)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    run_step(attached(model, NAMES, BackpropEstimator), model, batch)
    torch.manual_seed(1)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    assert same_bits(grads(model), grads(twin))
