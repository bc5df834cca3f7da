"""Whatever crosses a boundary and however often: the gradients are the oracle's."""

import copy
from collections import namedtuple
from itertools import pairwise

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    Told,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
    weights,
)
from torch import nn
from torch.nn import functional as F

from lightning_dni.estimators import BackpropEstimator, LinearEstimator, ZeroEstimator

Two = namedtuple("Two", ["a", "b"])

PACKINGS = {
    "tensor": (lambda a, b: torch.cat([a, b], 1), lambda v: v.split([4, 3], 1)),
    "tuple": (lambda a, b: (a, b), lambda v: v),
    "list": (lambda a, b: [a, b], lambda v: v),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda v: (v["a"], v["b"])),
    "named tuple": (lambda a, b: Two(a, b), lambda v: (v.a, v.b)),
    "nested": (lambda a, b: {"x": [a, (3, "s", None)], "y": ((b,),)}, lambda v: (v["x"][0], v["y"][0][0])),
    "beside integers": (lambda a, b: (a, torch.arange(3), b, 7), lambda v: (v[0], v[2])),
    "chunks": (lambda a, b: torch.cat([a, b], 1).split([4, 3], 1), lambda v: v),
    "twice": (lambda a, b: (a, b, a), lambda v: ((v[0] + v[2]) / 2, v[1])),
}


class Pack(nn.Module):
    def __init__(self, packing):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4).double(), nn.Linear(5, 3).double()
        self.packing = PACKINGS[packing][0]

    def forward(self, x):
        return self.packing(self.a(x).tanh(), self.b(x).tanh())


class Unpack(nn.Module):
    def __init__(self, packing):
        super().__init__()
        self.layer = nn.Linear(7, CLASSES).double()
        self.unpacking = PACKINGS[packing][1]

    def forward(self, value):
        return self.layer(torch.cat(self.unpacking(value), 1))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_structure_crosses(packing, bp_lambda):
    model, (x, y) = nn.Sequential(Pack(packing), Unpack(packing)), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0"], bp_lambda=bp_lambda), model, (x, y))
    a, b = twin[0].a(x).tanh(), twin[0].b(x).tanh()
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    F.cross_entropy(twin[1].layer(torch.cat(leaves, 1)), y).backward()
    times = [2, 1] if packing == "twice" else [1, 1]  # every leaf that crosses is given its own
    given = [t.detach().sin() * n / 8 for t, n in zip((a, b), times, strict=True)]
    mixed = [(1 - bp_lambda) * g + bp_lambda * t.grad for g, t in zip(given, leaves, strict=True)]
    torch.autograd.backward([a, b], mixed)
    assert_close(grads(model), grads(twin), atol=1e-14)


class Spare(nn.Module):
    """Gives two tensors of layers of their own, and reads the first of what it is given."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return self.used(x).tanh(), self.spare(x)


class First(nn.Linear):
    def forward(self, x):
        return super().forward(x[0])


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"bp_lambda": 1.0}, 1.0),
        ({"estimator": BackpropEstimator}, 1.0),
        ({"bp_lambda": 0.5, "estimator": ZeroEstimator}, 0.5),
    ],
    ids=str,
)
def test_what_nobody_goes_on_from_has_no_gradient_as_in_backprop(options, share, probe):
    """It was zero, and an optimizer with weight decay or momentum moved those weights."""
    model, (x, y) = nn.Sequential(Spare(), Spare(), First(5, CLASSES)).double(), blobs()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    engine = attached(model, ["0", "1"], **options)
    if probe:
        engine.request_probe()
    run_step(engine, model, (x, y))
    found, expected = grads(model), grads(twin)
    assert expected["0.spare.weight"] is None
    for stage, times in (("0", share**2), ("1", share), ("2", 1.0)):
        of = lambda all_of, k=stage: {n: g for n, g in all_of.items() if n.startswith(k)}
        scaled = {n: None if g is None else g * times for n, g in of(expected).items()}
        assert_close(of(found), scaled)


def test_what_is_no_gradient_passes_as_it_is():
    passed = []
    model = nn.Sequential(Pack("beside integers"), Unpack("beside integers"))
    model[1].register_forward_pre_hook(lambda module, args: passed.append(args[0]))
    run_step(attached(model, ["0"]), model, blobs())
    assert type(passed[0]) is tuple
    assert passed[0][3] == 7
    assert torch.equal(passed[0][1], torch.arange(3))


def test_values_pass_unchanged():
    model, (x, y) = mlp(dropout=0.5), blobs()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    loss = run_step(attached(model, ["0", "1"]), model, (x, y))
    torch.manual_seed(1)
    assert torch.equal(loss, F.cross_entropy(twin(x), y))


class Repeated(nn.Module):
    """One cell three times, cut after each run."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(5, 5).double(), nn.Linear(5, CLASSES).double()

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x.tanh())
        return self.head(x)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_module_that_runs_several_times_is_cut_every_time(bp_lambda):
    model, (x, y) = Repeated(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["cell"], bp_lambda=bp_lambda), model, (x, y))
    inputs, outputs = [x], []
    for _ in range(3):
        outputs.append(twin.cell(inputs[-1].tanh()))
        inputs.append(outputs[-1].detach().requires_grad_())
    F.cross_entropy(twin.head(inputs[-1]), y).backward()
    for h, leaf in reversed(list(zip(outputs, inputs[1:], strict=True))):
        h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_module_object_at_two_places_adds_up_across_a_cut(bp_lambda):
    shared = nn.Linear(5, 5).double()
    model, (x, y) = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, CLASSES).double()), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["1"], bp_lambda=bp_lambda), model, (x, y))
    h = twin[:2](x)
    leaf = h.detach().requires_grad_()
    F.cross_entropy(twin[2:](leaf), y).backward()
    h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(grads(model), grads(twin), atol=1e-14)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.head = mlp((5, 6, 4)), nn.Linear(8, CLASSES).double()

    def forward(self, x):
        return self.head(torch.cat([self.tower(x), self.tower(-x)], 1))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_siamese_towers_add_up(bp_lambda):
    model, (x, y) = Towers(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["tower.0"], bp_lambda=bp_lambda), model, (x, y))
    hs = [twin.tower[0](x), twin.tower[0](-x)]
    leaves = [h.detach().requires_grad_() for h in hs]
    F.cross_entropy(twin.head(torch.cat([twin.tower[1](t) for t in leaves], 1)), y).backward()
    for h, leaf in zip(hs, leaves, strict=True):
        h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("boundaries", [["0", "1"], ["1", "0"], ["[01]"]])
def test_boundaries_come_in_any_order(boundaries):
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, boundaries, bp_lambda=0.5), model, batch)
    run_step(attached(twin, ["0", "1"], bp_lambda=0.5), twin, batch)
    assert same_bits(grads(model), grads(twin))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_nothing_is_built_below_frozen_stages(bp_lambda):
    model, batch = mlp((5, 6, 7, 6, CLASSES)), blobs()
    model[:2].requires_grad_(False)
    engine = attached(model, ["0", "1", "2"], LinearEstimator, bp_lambda=bp_lambda)
    run_step(engine, model, batch)
    assert list(engine.estimators) == ["2"]
    assert all(p.grad is None for p in model[:2].parameters())
    assert model[3].weight.grad is not None


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("frozen", ["0.0.weight", "0.0.bias", "1.0.weight"])
def test_a_partly_frozen_stage_is_the_oracles(frozen, bp_lambda):
    model, (x, y) = mlp(), blobs()
    full = copy.deepcopy(model)
    model.get_parameter(frozen).requires_grad_(False)
    run_step(attached(model, ["0", "1"], bp_lambda=bp_lambda), model, (x, y))
    run_step(attached(full, ["0", "1"], bp_lambda=bp_lambda), full, (x, y))
    assert_close(grads(model), {**grads(full), frozen: None}, atol=0)


def test_a_frozen_stage_between_passes_the_gradient_on():
    model, batch = mlp((5, 6, 7, 6, CLASSES)), blobs()
    full = copy.deepcopy(model)
    model[1].requires_grad_(False)
    for net in (model, full):
        run_step(attached(net, ["0", "1", "2"], bp_lambda=0.5), net, batch)
    assert same_bits(grads(model), {**grads(full), "1.0.weight": None, "1.0.bias": None})


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_modules_in_eval_mode_train_as_such(bp_lambda):
    model, (x, y) = mlp(dropout=0.5, batch_norm=True), blobs()
    model[0].eval()
    before, twin = weights(model), copy.deepcopy(model)
    run_step(attached(model, ["0"], bp_lambda=bp_lambda), model, (x, y))
    assert torch.equal(model[0][1].running_mean, before["0.1.running_mean"])
    h = twin[0](x)
    if bp_lambda == 0:
        h.backward(h.detach().sin() / 8)
        assert_close(grads(model[0]), grads(twin[0]), atol=1e-14)
    else:
        assert model[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_an_input_that_requires_grad_gets_its_gradient(bp_lambda):
    model, (x, y) = mlp(), blobs()
    x.requires_grad_()
    run_step(attached(model, ["0"], bp_lambda=bp_lambda), model, (x, y))
    ours, x.grad = x.grad, None
    h = model[0](x)
    leaf = h.detach().requires_grad_()
    F.cross_entropy(model[1:](leaf), y).backward()
    h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    torch.testing.assert_close(ours, x.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_boundary_that_returns_its_input_is_a_stage_without_weights(bp_lambda):
    inner = mlp()
    model, batch = nn.Sequential(inner[0], nn.Identity(), inner[1], inner[2]), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0", "1"], bp_lambda=bp_lambda), model, batch)
    if bp_lambda == 1.0:
        F.cross_entropy(twin(batch[0]), batch[1]).backward()
        assert same_bits(grads(model), grads(twin))
    else:
        run_step(attached(twin, ["0"], bp_lambda=0.0), twin, batch)
        difference = model[0][0].weight.grad - twin[0][0].weight.grad
        assert (difference.abs().max() < 1e-15) == (bp_lambda == 0.0)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_boundary_inside_a_boundary_is_cut_too(bp_lambda):
    model, batch = mlp(), blobs()
    engine = attached(model, ["0", "0.0"], bp_lambda=bp_lambda)
    engine.request_probe()
    run_step(engine, model, batch)
    assert list(engine.last_report.boundaries) == ["0.0", "0"]


def test_a_sequence_model_is_cut_per_position():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, CLASSES)).double()
    ids, y = torch.randint(0, 11, (4, 9)), torch.randint(0, CLASSES, (4, 9))
    engine = attached(
        model, ["0", "1"], LinearEstimator, loss_denominator=lambda batch, h: float(batch[1].numel())
    )
    run_step(engine, model, (ids, y), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()))
    assert engine.estimators["1"].map.weight.shape == (7, 7)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_sparse_gradients_arrive_sparse(bp_lambda):
    model = nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Linear(6, CLASSES)).double()
    ids, y = torch.randint(0, 11, (8,)), torch.randint(0, CLASSES, (8,))
    twin = copy.deepcopy(model)
    engine = attached(model, ["0"], bp_lambda=bp_lambda)
    for net in (model, model):
        engine.request_probe()
        run_step(engine, net, (ids, y))
    assert model[0].weight.grad.is_sparse
    h = twin[0](ids)
    leaf = h.detach().requires_grad_()
    F.cross_entropy(twin[1](leaf), y).backward()
    h.backward(2 * ((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad))
    torch.testing.assert_close(
        model[0].weight.grad.to_dense(), twin[0].weight.grad.to_dense(), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("seed", range(12))
def test_random_nets_are_the_oracles(seed):
    """Random depth, cuts, lambdas and kinds of estimator, three steps, probed or not."""
    from oracles import decoupled_backward

    torch.manual_seed(seed)
    depth = int(torch.randint(2, 7, ()))
    widths = (5, *(int(w) for w in torch.randint(3, 9, (depth - 1,))), CLASSES)
    model = mlp(widths, batch_norm=bool(seed % 2))
    cuts = sorted({int(k) for k in torch.randint(0, depth - 1, (depth,))})
    lambdas = {str(k): float(torch.tensor([0, 0.3, 1.0])[torch.randint(3, ())]) for k in cuts}
    rules = {str(k): (None if torch.rand(()) < 0.25 else torch.sin) for k in cuts}
    twin = copy.deepcopy(model)
    edges = [0, *(k + 1 for k in cuts), depth]
    stages = [twin[a:b] for a, b in pairwise(edges)]

    def make(spec):
        return ZeroEstimator(spec) if rules[spec.name] is None else Told(spec)

    engine = attached(model, [str(k) for k in cuts], make, bp_lambda=lambdas)
    for step in range(3):
        x, y = blobs()
        if step == 1:
            engine.request_probe()
        run_step(engine, model, (x, y))
        decoupled_backward(
            stages, x, lambda out, y=y: F.cross_entropy(out, y), list(rules.values()), list(lambdas.values())
        )
        assert_close(grads(model), grads(twin), atol=1e-13)
