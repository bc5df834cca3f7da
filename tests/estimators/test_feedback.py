"""Backprop, FA, DFA and Kickback as estimators, against the same rules written out without autograd."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import FeedbackByHand
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, Record
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    BackpropEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
)

CLASSES, ROWS, STEPS, RATE = 4, 6, 5, 1e-2
RULES = {
    "backprop": BackpropEstimator,
    "fa": FeedbackAlignmentEstimator,
    "dfa": DirectFeedbackAlignmentEstimator,
    "kickback": KickbackEstimator,
}


def cross_entropy(output, y):
    return F.cross_entropy(output, y)


def squared_error(output, y):
    return 0.5 * (output - F.one_hot(y, CLASSES)).square().sum(1).mean()


ERRORS = {
    cross_entropy: lambda p, y: (p.softmax(1) - F.one_hot(y, CLASSES)) / len(p),
    squared_error: lambda p, y: (p - F.one_hot(y, CLASSES)) / len(p),
}


def mlp(boundary="relu"):
    """Layers and ReLU as children; the boundaries are the ReLUs, or what lies below them."""
    widths = (5, 8, 7, 6)
    parts = []
    for a, b in pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*parts, nn.Linear(widths[-1], CLASSES)).double()
    layers = ["0", "2", "4", "6"]
    return model, layers, [str(int(n) + (boundary == "relu")) for n in layers[:-1]], (5,)


def cnn(boundary="relu"):
    """Convolutions with stride and padding, the last map flattened for a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=boundary == "relu"),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, CLASSES),
    ).double()
    return model, ["0", "2", "5"], ["1", "3"] if boundary == "relu" else ["0", "2"], (2, 6, 6)


def matrices_of(rule, engine, layers):
    """The fixed matrices in the order of the hand-written loop; each was drawn by its estimator."""
    if rule == "fa":
        return [e.matrices.drawn[n] for e, n in zip(engine.estimators.values(), layers[1:], strict=True)]
    if rule == "dfa":
        return [e.matrices.drawn["0"] for e in engine.estimators.values()]
    return None


def train(model, engine, batches, loss_of):
    """A user's loop with plain SGD; gives what each boundary was given in the last step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in batches:
        optimizer.zero_grad()
        engine.request_report()
        with engine.training_step((x, y)):
            loss = loss_of(model(x), y)
        engine.backward(loss)
        optimizer.step()
        engine.update_estimators()
    return [report.synthetic / len(x) for report in engine.last_report.boundaries.values()]


@pytest.mark.parametrize("boundary", ["relu", "below relu"])
@pytest.mark.parametrize("net", [mlp, cnn])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_rule_written_by_hand(rule, net, boundary):
    """Also where the ReLU lies between the cut and the layer that reads it."""
    model, layers, boundaries, inputs = net(boundary)
    twin = copy.deepcopy(model)
    loss_of = squared_error if rule == "kickback" else cross_entropy
    batches = [
        (torch.randn(ROWS, *inputs, dtype=torch.float64), torch.randint(CLASSES, (ROWS,)))
        for _ in range(STEPS)
    ]
    engine = DNIEngine(model, boundaries, RULES[rule])
    with engine:
        said = train(model, engine, batches, loss_of)
    chain = [twin.get_submodule(name) for name in layers]
    matrices = matrices_of(rule, engine, layers)
    hand = FeedbackByHand(chain, rule, ERRORS[loss_of], matrices, before_relu=boundary != "relu", lr=RATE)
    for x, y in batches:
        hand.step(x, y)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    assert all(g.norm() > 1e-3 for g in said)  # Kickback's would be zero under cross-entropy
    if boundary == "relu":
        for ours, theirs in zip(said, hand.sent, strict=True):
            torch.testing.assert_close(ours, theirs.flatten(1), rtol=0, atol=1e-12)


# ---- what is told, and when


def stepped(model, estimator, loss_of=cross_entropy, boundaries=("1", "3"), rows=ROWS, **options):
    """One step of a fresh engine on random data."""
    batch = torch.randn(rows, 5, dtype=torch.float64), torch.randint(CLASSES, (rows,))
    engine = DNIEngine(model, list(boundaries), estimator, **options)
    with engine:
        with engine.training_step(batch):
            loss = loss_of(model(batch[0]), batch[1])
        engine.backward(loss)
    return engine


def test_kickback_refuses_errors_that_sum_to_zero():
    with pytest.raises(
        EstimatorError, match=r"sum to zero.*softmax cross-entropy.*squared error, or pass Kick"
    ):
        stepped(mlp()[0], KickbackEstimator)


def test_kickback_takes_an_error_of_probabilities_under_cross_entropy():
    model = mlp()[0]
    stepped(model, partial(KickbackEstimator, num_classes=CLASSES))
    assert model[0].weight.grad.norm() > 1e-3


def test_to_kickback_minus_100_is_no_label_of_padding():
    """Where nobody looks at labels: on a GPU after the first step."""
    h, error, y = torch.zeros(2, 3), torch.zeros(2, CLASSES), torch.tensor([0, -100])
    estimator = KickbackEstimator(BoundarySpec.of("b", [h]), num_classes=CLASSES)
    with pytest.raises(IndexError, match="out of bounds"):
        estimator.correct(Record((h,), y, None, None), Feedback(output=error, output_gradient=error))


def test_kickback_takes_a_module_that_gives_probabilities():
    """Then the derivative at the network's output is with respect to them."""
    model = nn.Sequential(*mlp()[0], nn.Softmax(1))
    stepped(model, KickbackEstimator, lambda p, y: F.nll_loss(p.log(), y))
    assert model[0].weight.grad.norm() > 1e-3


def test_kickback_takes_a_single_output():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    stepped(model, KickbackEstimator, lambda p, y: F.softplus(p).mean(), boundaries=["1"])
    assert model[0].weight.grad.norm() > 1e-3


def test_kickback_needs_scores_for_probabilities():
    with pytest.raises(
        EstimatorError, match=r"KickbackEstimator at boundary '1' to be class scores of shape \(6, 3"
    ):
        stepped(
            mlp()[0],
            partial(KickbackEstimator, num_classes=3),
            lambda p, y: p.sum(),
            labels=lambda b: b[1] % 3,
        )


@pytest.mark.parametrize("estimator", [DirectFeedbackAlignmentEstimator, partial(KickbackEstimator)])
def test_an_output_that_the_loss_does_not_come_from_is_refused(estimator):
    model = mlp()[0]
    with pytest.raises(
        EstimatorError, match=r"gradient at the network's output for .*`output=`|network's output"
    ):
        stepped(model, estimator, lambda p, y: model[6](model[:6](torch.randn(6, 5).double())).sum())


def test_an_output_that_was_not_seen_is_refused():
    inner = mlp()[0]
    model = nn.ModuleDict({"net": inner, "head": nn.Identity()})
    batch = torch.randn(ROWS, 5, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))
    engine = DNIEngine(model, ["net.1"], DirectFeedbackAlignmentEstimator)
    with engine:
        with engine.training_step(batch):
            loss = F.cross_entropy(model["net"](batch[0]), batch[1])
        with pytest.raises(
            EstimatorError, match=r"gradient at the network's output for Direct.*Pass `output=`"
        ):
            engine.backward(loss)


def test_an_output_of_other_rows_is_refused():
    model = nn.Sequential(*mlp()[0], nn.Flatten(0, 1))
    with pytest.raises(
        EstimatorError, match=r"Expected `output` to give one row for each of the 6 rows .*\(24,\)"
    ):
        stepped(model, DirectFeedbackAlignmentEstimator, lambda p, y: p.sum())


class Noted(nn.Module):
    """Notes when its gradient is taken."""

    def __init__(self, name, order):
        super().__init__()
        self.name, self.order = name, order

    def forward(self, x):
        x = x * 1.0
        x.register_hook(lambda g: self.order.append(self.name))
        return x


@pytest.mark.parametrize(
    ("estimator", "loss_of", "waits"),
    [
        (DirectFeedbackAlignmentEstimator, cross_entropy, False),
        (KickbackEstimator, squared_error, False),
        (FeedbackAlignmentEstimator, cross_entropy, True),
        (BackpropEstimator, cross_entropy, True),
    ],
)
def test_the_direct_ones_wait_for_the_loss_but_for_no_backward_pass(estimator, loss_of, waits):
    """The lowest stage goes first: nothing had come back to it. Backprop goes from the top down."""
    order = []
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(5, 5), Noted(k, order)) for k in "ab"), nn.Linear(5, CLASSES)
    ).double()
    stepped(model, estimator, loss_of, boundaries=["0", "1"])
    assert order == (["b", "a"] if waits else ["a", "b"])


def test_nobody_differentiates_for_those_who_do_not_hear_it():
    """Under a direct rule a stage gives its weights their gradient, and nothing to the activation below."""
    model, asked = mlp()[0], []

    def watch(module, args):
        args[0].register_hook(lambda g: asked.append("below"))

    model[2].register_forward_pre_hook(watch)
    stepped(model, DirectFeedbackAlignmentEstimator)
    assert asked == []
    stepped(model, BackpropEstimator)
    assert asked == ["below"]


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("denominator", ["batch", "elements", "sum"])
def test_the_errors_are_in_units_of_the_per_row_loss(denominator, scale):
    """Whatever the loss is divided by, and however it is scaled, on the first step already."""
    torch.manual_seed(0)
    model = mlp()[0]
    twin, found = copy.deepcopy(model), []
    batch = torch.randn(ROWS, 5).double(), torch.randn(ROWS, CLASSES).double()
    divisor = {"batch": ROWS, "elements": ROWS * CLASSES, "sum": 1}
    for net, name, factor in ((model, denominator, scale), (twin, "batch", 1.0)):
        engine = DNIEngine(net, ["1", "3"], DirectFeedbackAlignmentEstimator, loss_denominator=name, seed=3)
        with engine:
            with engine.training_step(batch, scale=torch.tensor(factor)):
                loss = 0.5 * (net(batch[0]) - batch[1]).square().sum() / divisor[name]
            engine.backward(loss * factor)
        found.append([p.grad * divisor[name] / factor for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_several_losses_are_told_apart():
    """Two forward passes, each with its own output and backward pass, in one block."""
    model = mlp()[0]
    twin = copy.deepcopy(model)
    xs = torch.randn(2, ROWS, 5).double()
    engine, other = (
        DNIEngine(net, ["1", "3"], DirectFeedbackAlignmentEstimator, seed=3) for net in (model, twin)
    )
    with engine, engine.training_step((xs, None), several_losses=True):
        first, second = (model(x).square().sum() / ROWS for x in xs)
        engine.backward(second)
        engine.backward(first)
    with other:
        for x in xs:
            with other.training_step((x, None)):
                loss = twin(x).square().sum() / ROWS
            other.backward(loss)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


class TwoOutputs(nn.Module):
    """Its head runs twice on one activation."""

    def __init__(self):
        super().__init__()
        self.below, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.below(x)
        return self.head(h), self.head(h.tanh())


def test_a_loss_of_several_outputs_is_refused_and_one_that_only_looks_at_them_is_not():
    x, y = torch.randn(ROWS, 5), torch.randint(CLASSES, (ROWS,))
    model = TwoOutputs()
    for counts in (1, 0, 2):
        model.zero_grad()
        with DNIEngine(model, ["below"], DirectFeedbackAlignmentEstimator, output="head", seed=0) as engine:
            with engine.training_step((x, y)):
                outputs = model(x)
                losses = [F.cross_entropy(output, y) for output in outputs]
                loss = sum(losses) if counts == 2 else losses[counts]
            if counts == 2:
                with pytest.raises(
                    EstimatorError, match=r"boundary 'below', but the loss came back .* several"
                ):
                    engine.backward(loss)
                return
            engine.backward(loss)
        matrix = engine.estimators["below"].matrices.drawn["0"]
        (error,) = torch.autograd.grad(
            F.cross_entropy(leaf := outputs[counts].detach().requires_grad_(), y), leaf
        )
        torch.testing.assert_close(model.below.weight.grad, (error @ matrix).T @ x)
