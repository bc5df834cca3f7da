"""torch.compile in any arrangement: every step is cut as without it, or refused by name."""

import copy
import shutil

import pytest
import torch
import torch._inductor.config
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, run_step, same_bits
from oracles import decoupled_backward
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch.nn import functional as F
from versions import newer_torch

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.estimators import LinearEstimator

BACKEND = "eager"  # the least that a test needs; nothing of the engine depends on what runs a graph
ONE_NODE = "aot_eager"  # autograd sees one node per graph, as with inductor
NAMES = ["net.0", "net.1"]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, **_):
        super().__init__()
        stages = [nn.Sequential(nn.Linear(n, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()) for n in (5, 6)]
        self.net = nn.Sequential(*stages, nn.Linear(6, CLASSES)).double()

    def forward(self, x):
        return self.net(x)


def compiled(module, **options):
    return torch.compile(module, **{"backend": BACKEND, **options})


def wrap_each(model):
    for i, module in enumerate(model.net):
        model.net[i] = compiled(module)


def wrap_parent(model):
    model.net = compiled(model.net)


def in_place_each(model):
    for module in model.net:
        module.compile(backend=BACKEND)


def in_place_whole(model):
    model.compile(backend=BACKEND)


def wrap_inside(model):
    for stage in model.net[:2]:
        stage[0], stage[2] = compiled(stage[0]), compiled(stage[2])


ARRANGEMENTS = [wrap_each, wrap_parent, in_place_each, in_place_whole, wrap_inside]
each_arrangement = pytest.mark.parametrize("arrange", ARRANGEMENTS, ids=lambda f: f.__name__)


def plain_names(gradients):
    return {name.replace("_orig_mod.", ""): g for name, g in gradients.items()}


def assert_step_is_the_oracles(engine, model, called, batch, bp_lambda):
    """One step from the weights that `model` has."""
    twin = Net()
    twin.load_state_dict(plain_names(model.state_dict()))
    model.zero_grad()
    loss = run_step(engine, called, batch)
    said = [torch.sin] * 2
    loss_of = lambda out: F.cross_entropy(out, batch[1])
    expected, _ = decoupled_backward(twin.net, batch[0], loss_of, said, [bp_lambda] * 2)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    assert_close(plain_names(grads(model)), grads(twin), atol=1e-14)


@each_arrangement
@pytest.mark.parametrize("ran_before", [False, True])
def test_what_was_compiled_before_is_cut(arrange, ran_before):
    model, batch = Net(), blobs()
    arrange(model)
    if ran_before:
        model(batch[0]).sum().backward()
    engine = attached(model, NAMES, bp_lambda=0.5)
    for _ in range(2):
        assert_step_is_the_oracles(engine, model, model, batch, 0.5)
    assert engine.boundaries == ("net.0", "net.1")


@pytest.mark.parametrize("arrange", [wrap_each, in_place_whole])
def test_what_is_compiled_in_mid_fit_is_cut_or_refused(arrange):
    model, batch = Net(), blobs()
    engine = attached(model, NAMES, bp_lambda=0.5)
    assert_step_is_the_oracles(engine, model, model, batch, 0.5)
    arrange(model)
    for _ in range(2):
        assert_step_is_the_oracles(engine, model, model, batch, 0.5)


@pytest.mark.parametrize("arrange", [wrap_parent, in_place_each])
def test_what_is_compiled_between_fits_is_cut_then_left_alone(arrange):
    model, batch = Net(), blobs()
    with DNIEngine(model, NAMES, Told) as engine:
        assert_step_is_the_oracles(engine, model, model, batch, 0.0)
    arrange(model)
    with engine:
        assert_step_is_the_oracles(engine, model, model, batch, 0.0)
    with DNIEngine(model, NAMES, Told, bp_lambda=0.5) as engine:
        assert_step_is_the_oracles(engine, model, model, batch, 0.5)
    twin = Net()
    twin.load_state_dict(plain_names(model.state_dict()))
    model.zero_grad()
    for net in (model, twin):
        F.cross_entropy(net(batch[0]), batch[1]).backward()
    assert_close(plain_names(grads(model)), grads(twin), atol=1e-14)


@pytest.mark.parametrize("engine_on", ["inner", "wrapper"])
def test_a_wrapper_around_everything_is_cut(engine_on):
    model, batch = Net(), blobs()
    wrapper = compiled(model)
    engine = attached({"inner": model, "wrapper": wrapper}[engine_on], NAMES, bp_lambda=0.5)
    for _ in range(2):
        assert_step_is_the_oracles(engine, model, wrapper, batch, 0.5)


def whole_model(model):
    wrapper = compiled(model)
    return lambda x, y: F.cross_entropy(wrapper(x), y)


def model_and_loss(model):
    return compiled(lambda x, y: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("region", [whole_model, model_and_loss])
def test_a_region_outside_that_has_run_before_is_refused_until_reset(region):
    """The engine cannot see it from the model, and torch passes by hooks that came later."""
    model, batch = Net(), blobs()
    loss_of = region(model)
    loss_of(*batch)
    engine = attached(model, NAMES, bp_lambda=0.5)
    both = r"\['net\.0', 'net\.1'\] did not \(ran: \[\]\).*torch\.compile.*call torch\.compiler\.reset\(\)"
    with engine.training_step(batch):
        loss = loss_of(*batch)
    with pytest.raises(BoundaryError, match=both):
        engine.backward(loss)
    assert all(g is None for g in grads(model).values())
    torch.compiler.reset()
    cut = lambda x: loss_of(x, batch[1])
    twin = copy.deepcopy(model)
    run_step(engine, cut, batch, lambda loss, y: loss)
    last = lambda out: F.cross_entropy(out, batch[1])
    decoupled_backward(twin.net, batch[0], last, [torch.sin] * 2, [0.5] * 2)
    assert_close(grads(model), grads(twin), atol=1e-14)


def test_a_region_around_one_of_two_boundaries_is_refused_by_that_name():
    model, batch = Net(), blobs()
    lower = compiled(lambda x: model.net[0](x))
    forward = lambda x: model.net[2](model.net[1](lower(x)))
    forward(batch[0])
    engine = attached(model, NAMES)
    with pytest.raises(BoundaryError, match=r"\['net\.0'\] did not \(ran: \['net\.1'\]\)"):
        run_step(engine, forward, batch)


@newer_torch
@pytest.mark.parametrize("whole", [compiled, lambda model, **options: model.compile(**options) or model])
def test_one_full_graph_around_a_boundary_is_refused(whole):
    model, batch = Net(), blobs()
    called = whole(model, fullgraph=True, backend=BACKEND)
    engine = attached(model, NAMES)
    with pytest.raises(
        BoundaryError, match=r"\['net\.0', 'net\.1'\] to lie outside .* leave out fullgraph=True"
    ):
        run_step(engine, called, batch)


def test_full_graphs_between_boundaries_are_legal():
    model, batch = Net(), blobs()
    for i, module in enumerate(model.net):
        model.net[i] = compiled(module, fullgraph=True)
    assert_step_is_the_oracles(attached(model, NAMES), model, model, batch, 0.0)


# ---- names


@pytest.mark.parametrize(
    "named", [NAMES, ["net.0._orig_mod", "net.1._orig_mod"], ["net._orig_mod.0", "net.1"], ["net.[01]"]]
)
@pytest.mark.parametrize("arrange", [wrap_each, wrap_parent])
def test_names_are_those_of_the_model_without_wrappers(arrange, named):
    model, batch = Net(), blobs()
    arrange(model)
    engine = attached(model, named)
    assert engine.boundaries == ("net.0", "net.1")
    assert_step_is_the_oracles(engine, model, model, batch, 0.0)


def test_an_unknown_name_is_suggested_without_wrappers():
    model = Net()
    wrap_parent(model)
    with pytest.raises(BoundaryError, match=r"got 'net\.8'\. Did you mean 'net\.2'\?"):
        DNIEngine(model, ["net.8"], Told)


def test_the_output_is_named_without_wrappers():
    model = Net()
    wrap_parent(model)
    engine = attached(model, NAMES, output="net.2")
    engine.detach()
    with pytest.raises(BoundaryError, match=r"`output` .*got 'net\.8'\. Its children are \['net'\]"):
        DNIEngine(model, NAMES, Told, output="net.8")


def test_estimators_move_between_compiled_and_plain():
    model, batch = Net(), blobs()
    engine = attached(model, NAMES, LinearEstimator)
    run_step(engine, model, batch)
    engine.update_estimators()
    engine.detach()
    wrap_parent(model)
    other = attached(model, NAMES, LinearEstimator)
    other.load_state_dict(engine.state_dict())
    for name, estimator in engine.estimators.items():
        assert same_bits(estimator.state_dict(), other.estimators[name].state_dict())


# ---- leaks


class Leaky(nn.Module):
    """Two stages; `way` says what else goes up from the lower one."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, 5).double() for _ in range(3))
        self.way = way

    def forward(self, x):
        inner = self.a(x).tanh()
        aside = {
            "skip": inner,
            "auxiliary": inner.square().mean(),
            "view": inner.view(-1, 5)[:1],
            "weights": self.a.weight.square().sum(),
            "nothing": 0.0,
        }[self.way]
        return self.c(self.b(inner).tanh()) + aside


@pytest.mark.parametrize(
    ("way", "whole", "bp_lambda"),
    [
        ("skip", "wrapped", 0.0),
        ("skip", "in place", 1.0),
        ("auxiliary", "wrapped", 0.5),
        ("view", "wrapped", 0.0),
        ("weights", "wrapped", 0.0),
    ],
)
def test_a_way_around_a_cut_inside_one_graph_is_refused(way, whole, bp_lambda):
    """Of a weight penalty, too, where it is in the stage's graph: autograd cannot tell them apart."""
    model = Leaky(way)
    called = compiled(model, backend=ONE_NODE) if whole == "wrapped" else model
    if whole == "in place":
        model.compile(backend=ONE_NODE)
    engine = attached(model, ["b"], bp_lambda=bp_lambda)
    match = r"leaks around boundary 'b'.*CompiledFunctionBackward.*compile submodules"
    with pytest.raises(BoundaryError, match=match):
        run_step(engine, called, blobs(), lambda out, y: out.square().mean())


def test_a_weight_penalty_beside_the_compiled_modules_is_legal():
    model, batch = Leaky("weights"), blobs()
    twin = copy.deepcopy(model)
    for name in ("a", "b", "c"):
        model.get_submodule(name).compile(backend=ONE_NODE)
    for net in (model, twin):
        run_step(attached(net, ["b"], bp_lambda=0.5), net, batch, lambda out, y: out.square().mean())
    assert_close(grads(model), grads(twin), atol=1e-14)


# ---- what compiling costs


def graphs_after_each_step(model, steps=3):
    counters.clear()
    engine, found = attached(model, NAMES, LinearEstimator), []
    for _ in range(steps):
        run_step(engine, model, blobs())
        engine.update_estimators()
        found.append(counters["stats"]["unique_graphs"])
    return found


@newer_torch
@pytest.mark.parametrize(("arrange", "graphs"), [(wrap_each, 3), (in_place_each, 2)])
def test_nothing_of_the_engine_is_traced(arrange, graphs):
    """One graph for every submodule and no other, in the first step and never again.

    Of those compiled in place torch passes over what is its own and has no hooks: the head.
    """
    model = Net()
    arrange(model)
    assert graphs_after_each_step(model) == [graphs] * 3
    assert bool(counters["graph_break"]) == (arrange is in_place_each)
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])


def test_a_model_that_is_not_compiled_resets_nothing():
    made, model = [], Net()

    def backend(graph, inputs):
        made.append(graph)
        return graph

    other = torch.compile(torch.sin, backend=backend)
    other(torch.ones(1))
    engine = attached(model, NAMES)
    run_step(engine, model, blobs())
    other(torch.ones(1))
    assert len(made) == 1


# ---- the rest of the library


@pytest.mark.parametrize("arrange", [wrap_each, in_place_whole])
def test_probes_are_the_same(arrange):
    model, batch = Net(), blobs()
    twin = copy.deepcopy(model)
    arrange(model)
    reports = []
    for net in (model, twin):
        engine = attached(net, NAMES)
        engine.request_probe()
        run_step(engine, net, batch)
        reports.append(engine.last_report.boundaries)
    for name in NAMES:
        torch.testing.assert_close(reports[0][name].true, reports[1][name].true, rtol=0, atol=1e-14)


@newer_torch
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_is_the_same(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # a pool of them would stay
    model, batch = Net(), blobs()
    model.net[0], model.net[1] = torch.compile(model.net[0]), torch.compile(model.net[1])
    engine = attached(model, NAMES, bp_lambda=0.5)
    assert_step_is_the_oracles(engine, model, model, batch, 0.5)
    engine.request_probe()
    with pytest.raises(StageError, match=r"below boundary 'net\.1' to be .*twice .*donated_buffer = False"):
        run_step(engine, model, batch)
    with functorch.patch(donated_buffer=False):
        torch.compiler.reset()
        engine.request_probe()
        assert_step_is_the_oracles(engine, model, model, batch, 0.5)
