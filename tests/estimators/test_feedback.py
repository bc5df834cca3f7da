"""Backprop, FA, DFA and Kickback as estimators, against the same rules written out without autograd."""

import copy
from itertools import pairwise

import pytest
import torch
from oracles import FeedbackByHand
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
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
