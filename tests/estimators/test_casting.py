"""One language for error approximators (Czarnecki et al. 2017, section 6): given is dl/dh of a fixed s."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec, Record
from lightning_dni.estimators import (
    BackpropEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
)

CLASSES, ROWS, WIDTH = 3, 8, 6


def cast(s, h, target):
    """dl/dh of l(t, s) = -<t, s(h)>, with a target that is no function of h."""
    h = h.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(-(target.detach() * s(h)).sum(), h)
    return gradient


@pytest.fixture
def told():
    """A net with one boundary, its batch, and what backprop says of it in units of the per-row loss."""
    model = nn.Sequential(
        nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    )
    model, x, y = model.double(), torch.randn(ROWS, 5).double(), torch.randn(ROWS, CLASSES).double()
    h = model[:2](x)
    g = model[2](h)
    p = model[3:](g)
    loss = 0.5 * (p - y).square().sum()
    return model, (x, y), h, dict(zip("hgp", torch.autograd.grad(loss, (h, g, p)), strict=True))


def given_by(estimator, model, batch):
    """What a step of the engine gives the stage below, and the estimator."""
    engine = DNIEngine(model, ["1"], estimator)
    with engine:
        engine.request_report()
        with engine.training_step(batch):
            loss = 0.5 * (model(batch[0]) - batch[1]).square().sum() / ROWS
        engine.backward(loss)
    return engine.last_report.boundaries["1"].synthetic, engine.estimators["1"]


def exactly(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_identity_is_backprop(told):
    model, batch, h, gradients = told
    given, _ = given_by(BackpropEstimator, model, batch)
    exactly(given, cast(lambda h: h, h, -gradients["h"]))
    exactly(given, gradients["h"])


@pytest.mark.filterwarnings("ignore:Expected every linear layer")
def test_a_fixed_random_matrix_on_the_next_layers_error_is_feedback_alignment(told):
    model, batch, h, gradients = told
    given, estimator = given_by(FeedbackAlignmentEstimator, model, batch)
    matrix = estimator.matrices.drawn["2"]
    assert matrix.shape == model[2].weight.shape
    exactly(given, cast(lambda h: h @ matrix.t(), h, -gradients["g"]))


def test_a_fixed_random_matrix_on_the_outputs_error_is_direct_feedback_alignment(told):
    model, batch, h, gradients = told
    given, estimator = given_by(DirectFeedbackAlignmentEstimator, model, batch)
    matrix = estimator.matrices.drawn["0"]
    assert matrix.shape == (CLASSES, WIDTH)
    exactly(given, cast(lambda h: h @ matrix.t(), h, -gradients["p"]))


def test_a_matrix_of_ones_on_the_outputs_error_is_kickback(told):
    model, batch, h, gradients = told
    given, _ = given_by(KickbackEstimator, model, batch)
    assert given.norm() > 0.1
    exactly(given, cast(lambda h: h @ torch.ones(WIDTH, CLASSES).double(), h, -gradients["p"]))


def test_the_identity_with_a_squared_distance_is_sg_plus_prop():
    """s = hA + C and l = |t - s|^2: given s + a * 2 (s - t) A^T."""
    spec = BoundarySpec("net.1", (LeafSpec((WIDTH,), torch.float64),))
    estimator = LinearEstimator(spec, prop_alpha=0.3).double()
    nn.init.normal_(estimator.map.weight)
    h, target = torch.randn(2, ROWS, WIDTH).double()
    (said,), _ = estimator.synthesize((h,), None, None)
    (given,) = estimator.correct(Record((h,), None, (said,), None), Feedback(target=(target,)))
    exactly(given, (said + 0.3 * 2 * (said - target) @ estimator.map.weight).detach())


@pytest.mark.parametrize("scores", [(ROWS, CLASSES), (ROWS, 4, CLASSES)], ids=str)
def test_kickback_with_respect_to_probabilities(scores):
    """The derivative of -log p with respect to the probabilities, summed over the classes."""
    output, h = torch.randn(scores).double(), torch.randn(*scores[:-1], WIDTH).double()
    labels = torch.randint(CLASSES, scores[:-1])
    p = output.softmax(-1).requires_grad_()
    F.nll_loss(p.log().flatten(0, -2), labels.flatten(), reduction="sum").backward()
    spec = BoundarySpec("net.1", (LeafSpec(tuple(h.shape[1:]), torch.float64),))
    told = Feedback(output=output, output_gradient=torch.zeros_like(output))
    record = Record((h,), labels, None, None)
    (given,) = KickbackEstimator(spec, num_classes=CLASSES).correct(record, told)
    exactly(given, p.grad.sum(-1, keepdim=True).expand_as(h))
    assert given.norm() > 1
