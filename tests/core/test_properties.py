"""Whatever net, boundaries, lambdas and losses hypothesis thinks of: the gradients are the oracle's."""

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from core.nets import assert_close, grads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine, GradientEstimator, Signal

CLASSES, FEATURES = 3, 4
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "none": nn.Identity}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
MANY, FEW = (settings(derandomize=True, deadline=None, max_examples=n, database=None) for n in (50, 15))


class Residual(nn.Module):
    """A block with a skip connection that stays inside it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class Affine(GradientEstimator):
    """hA + b from random weights, so that it is never zero; trained on its target."""

    needs = frozenset({Signal.TARGET})

    def __init__(self, spec):
        super().__init__()
        self.map = nn.Linear(*spec.shape, *spec.shape)

    def synthesize(self, h, context, state):
        return (self.map(h[0]),), None

    def loss(self, record, feedback):
        said, wanted = self.map(record.h[0]), feedback.target[0]
        return (said - wanted).square().sum(1).mean()


@dataclass
class Case:
    """One net and how it is trained; `seed` draws weights and data."""

    widths: list
    activations: list
    skips: list
    dtype: torch.dtype
    boundaries: list
    lambdas: dict
    rows: int
    denominator: str
    accumulate: int
    seed: int

    def net(self):
        torch.manual_seed(self.seed)
        blocks, features = [], FEATURES
        for width, activation, skip in zip(self.widths, self.activations, self.skips, strict=True):
            block = nn.Sequential(nn.Linear(features, width), ACTIVATIONS[activation]())
            inside = nn.Sequential(nn.Linear(width, width), nn.Tanh())
            blocks.append(nn.Sequential(block, Residual(inside)) if skip else block)
            features = width
        return nn.Sequential(*blocks, nn.Linear(features, CLASSES)).to(self.dtype)

    def batches(self):
        torch.manual_seed(self.seed + 1)
        labels = [torch.randint(CLASSES, (self.rows,)) for _ in range(self.accumulate)]
        return [(torch.randn(self.rows, FEATURES, dtype=self.dtype), y) for y in labels]

    def divisor(self):
        """What the sum of the rows' losses is divided by."""
        by_kind = {"batch": self.rows, "sum": 1, "elements": self.rows * CLASSES, "callable": 7.0}
        return by_kind[self.denominator]

    def loss_of(self, out, y):
        if self.denominator == "elements":
            return F.mse_loss(out, F.one_hot(y, CLASSES).to(out.dtype))
        return F.cross_entropy(out, y, reduction="sum") / self.divisor()

    def stages(self, net):
        """The modules between boundaries."""
        ends = [0, *sorted(int(name) + 1 for name in self.boundaries), len(net)]
        return [net[a:b] for a, b in pairwise(ends)]


@st.composite
def cases(draw):
    depth = draw(st.integers(1, 4))
    each = lambda values: draw(st.lists(values, min_size=depth, max_size=depth))
    names = st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth, unique=True)
    boundaries = [str(i) for i in draw(names)]
    some = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0, allow_subnormal=False))
    lambdas = {name: draw(some) for name in boundaries}
    return Case(
        widths=each(st.integers(1, 6)),
        activations=each(st.sampled_from(sorted(ACTIVATIONS))),
        skips=each(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        boundaries=boundaries,
        lambdas=lambdas,
        rows=draw(st.integers(1, 5)),
        denominator=draw(st.sampled_from(["batch", "sum", "elements", "callable"])),
        accumulate=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
    )


def built(case):
    """A net, its engine with estimators in place, and nothing learnt yet."""
    model = case.net()
    denominator = (lambda batch, h: 7.0) if case.denominator == "callable" else case.denominator
    engine = DNIEngine(
        model, case.boundaries, Affine, bp_lambda=case.lambdas, loss_denominator=denominator, seed=case.seed
    )
    engine.attach()
    if case.denominator == "elements":  # unknown until the first output, when only zero may be said
        engine.load_state_dict({**engine.state_dict(), "elements_per_row": CLASSES})
    x, y = case.batches()[0]
    with engine.training_step((x, y)):
        loss = case.loss_of(model(x), y)
    engine.backward(loss)
    engine.drop_estimator_gradients()
    model.zero_grad()
    return model, engine


def by_hand(case, stages, estimators, x, y):
    """One forward and backward pass of one of `case.accumulate` batches.

    Gradients add up in the stages and in the estimators; returns SG, target and true gradient of every
    cut, in units of the per-row loss.
    """
    inputs, outputs = [x], []
    for stage in stages[:-1]:
        outputs.append(stage(inputs[-1]))
        inputs.append(outputs[-1].detach().requires_grad_())
    (case.loss_of(stages[-1](inputs[-1]), y) / case.accumulate).backward()
    unit = case.divisor() * case.accumulate
    facts = []
    for k in reversed(range(len(outputs))):
        name = sorted(case.boundaries, key=int)[k]
        incoming, estimator, bp_lambda = inputs[k + 1].grad, estimators[name], case.lambdas[name]
        said = estimator.map(outputs[k].detach())
        target = incoming * unit
        ((said - target).square().sum(1).mean() / case.accumulate).backward()
        outputs[k].backward((1 - bp_lambda) * said.detach() / unit + bp_lambda * incoming)
        facts.append((name, said.detach(), target))
    return facts


def true_by_hand(case, stages, x, y):
    """Derivative of the rows' summed loss at every cut by plain backprop."""
    h, cuts = x, []
    for stage in stages[:-1]:
        h = stage(h)
        h.retain_grad()
        cuts.append(h)
    (case.loss_of(stages[-1](h), y) * case.divisor()).backward()
    return {name: h.grad for name, h in zip(sorted(case.boundaries, key=int), cuts, strict=True)}


@MANY
@given(cases())
def test_gradients_of_weights_and_estimators_are_the_oracles(case):
    model, engine = built(case)
    twin, estimators = copy.deepcopy(model), copy.deepcopy(engine.estimators)
    for x, y in case.batches():
        with engine.training_step((x, y), accumulate=case.accumulate):
            loss = case.loss_of(model(x), y) / case.accumulate
        engine.backward(loss)
        by_hand(case, case.stages(twin), estimators, x, y)
    assert_close(grads(model), grads(twin), TOLERANCE[case.dtype] * scale(grads(twin)))
    for name, estimator in engine.estimators.items():
        expected = grads(estimators[name])
        assert_close(grads(estimator), expected, TOLERANCE[case.dtype] * scale(expected))


@MANY
@given(cases())
def test_a_probe_finds_the_true_gradient_and_changes_nothing(case):
    model, engine = built(case)
    twin, estimators = copy.deepcopy(model), copy.deepcopy(engine.estimators)
    case.accumulate = 1
    x, y = case.batches()[0]
    engine.request_probe()
    with engine.training_step((x, y)):
        loss = case.loss_of(model(x), y)
    engine.backward(loss)
    true = true_by_hand(case, case.stages(copy.deepcopy(twin)), x, y)
    for name, said, target in by_hand(case, case.stages(twin), estimators, x, y):
        report = engine.last_report.boundaries[name]
        for found, expected in [(report.synthetic, said), (report.target, target), (report.true, true[name])]:
            atol = TOLERANCE[case.dtype] * scale({name: expected})
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert_close(grads(model), grads(twin), TOLERANCE[case.dtype] * scale(grads(twin)))


def scale(gradients):
    """The largest number in them, at least one: what rounding is measured by."""
    return max(1.0, *(g.abs().max().item() for g in gradients.values() if g is not None))


@FEW
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_boundaries_does_not_matter(case, random):
    found = []
    for _ in range(2):
        model, engine = built(case)
        x, y = case.batches()[0]
        with engine.training_step((x, y)):
            loss = case.loss_of(model(x), y)
        engine.backward(loss)
        found.append(grads(model))
        random.shuffle(case.boundaries)
    assert_close(*found, atol=0)


@FEW
@given(cases())
def test_full_lambda_is_backprop_to_the_bit(case):
    case.lambdas = dict.fromkeys(case.boundaries, 1.0)
    model, engine = built(case)
    twin = copy.deepcopy(model)
    for x, y in case.batches():
        with engine.training_step((x, y), accumulate=case.accumulate):
            loss = case.loss_of(model(x), y) / case.accumulate
        engine.backward(loss)
        (case.loss_of(twin(x), y) / case.accumulate).backward()
    assert_close(grads(model), grads(twin), atol=0)
