"""Proposition 1: a critical point stays one where the estimator class holds the true gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.analysis import (
    artificial_data,
    deep_linear,
    representation_error,
    squared_error_map_below,
    stationarity,
)
from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticEstimator, LinearEstimator, MLPEstimator, ZeroEstimator


def spec(width, name="h"):
    return BoundarySpec(name, (LeafSpec((width,), torch.float64),))


def set_map(estimator, linear):
    with torch.no_grad():
        estimator.map.weight.copy_(linear.A.t())
        estimator.map.bias.copy_(linear.C)
        estimator.conditioning.weight.copy_(linear.B)


def squared(y):
    return lambda p: (p - y).square().sum(1) / 2


@pytest.fixture
def optimum():
    """A deep linear net at the global solution of noisy data, whose loss is not zero there."""
    x, y = artificial_data("noisy", 2, rows=60)
    model = deep_linear(2, hidden_layers=2)
    ones = torch.cat([x, x.new_ones(60, 1)], 1)
    best = torch.linalg.pinv(ones) @ y
    with torch.no_grad():
        upper = model[2].weight @ model[1].weight
        model[0].weight.copy_(torch.linalg.pinv(upper) @ best[:2].t())
        model[0].bias.copy_((torch.linalg.pinv(upper) @ best[2:].t()).squeeze(1))
    return x, y, model


def test_a_critical_point_stays_one_where_the_module_is_exact(optimum):
    x, y, model = optimum
    below, above = model[:1], model[1:]
    estimator = LinearEstimator(spec(2), context_size=1).double()
    w = (above[1].weight @ above[0].weight).t()
    set_map(estimator, squared_error_map_below(w, torch.zeros(1, dtype=torch.float64)))
    found = stationarity(below, above, estimator, x, y, squared(y))
    assert float(found.original) < 1e-13
    assert float(found.joint) < 1e-13
    assert float(squared(y)(model(x)).detach().mean()) > 0.01  # not for want of a loss


def test_residuals_are_the_norms_of_the_three_gradients():
    torch.manual_seed(0)
    below = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    above, x, labels = nn.Linear(3, 2).double(), torch.randn(7, 4).double(), torch.randint(2, (7,))
    estimator = LinearEstimator(spec(3), num_classes=2).double()
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    found = stationarity(
        below, above, estimator, x, labels, lambda p: F.cross_entropy(p, labels, reduction="none")
    )
    h = below(x)
    h.retain_grad()
    F.cross_entropy(above(h), labels).backward(retain_graph=True)
    target = 7 * h.grad.clone()
    norm = lambda grads: float(torch.cat([g.flatten() for g in grads]).norm())
    assert float(found.above) == pytest.approx(norm([p.grad for p in above.parameters()]))
    assert float(found.below_true) == pytest.approx(norm([p.grad for p in below.parameters()]))
    y = F.one_hot(labels, 2).double()
    said = h.detach() @ estimator.map.weight.t() + y @ estimator.conditioning.weight + estimator.map.bias
    lower = torch.autograd.grad(h, list(below.parameters()), said.detach() / 7)
    assert float(found.below) == pytest.approx(norm(lower))
    sg = (said - target).square().sum(1).mean()
    assert float(found.estimator) == pytest.approx(
        norm(torch.autograd.grad(sg, list(estimator.parameters())))
    )
    assert float(found.joint) == pytest.approx(max(map(float, found[:3])))
    assert float(found.original) == pytest.approx(max(float(found.above), float(found.below_true)))


def test_a_zero_estimator_has_two_conditions_that_hold_by_themselves():
    below, above = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    x, y = artificial_data("xor", 2, rows=10)
    found = stationarity(below, above, ZeroEstimator(spec(3)), x, y, squared(y))
    assert float(found.below) == float(found.estimator) == 0
    assert float(found.below_true) > 0


# ---- what a class can represent


def test_the_linear_class_holds_the_squared_error_and_not_a_step():
    torch.manual_seed(0)
    h, y = torch.randn(50, 3).double(), torch.randn(50, 2).double()
    estimator = LinearEstimator(spec(3), context_size=2).double()
    w = torch.randn(3, 2).double()
    held = (h @ w - y) @ w.t()
    assert float(representation_error(estimator, h, y, held)) < 1e-12
    step = (h @ w).sign() @ w.t()
    design = torch.cat([h, y, torch.ones(50, 1).double()], 1)
    nearest = design @ torch.linalg.lstsq(design, step).solution
    expected = float((nearest - step).norm() / step.norm())
    assert expected > 0.3
    assert float(representation_error(estimator, h, y, step)) == pytest.approx(expected)
    assert not estimator.map.weight.any()


def test_labels_enter_the_linear_class_as_vectors():
    h, labels = torch.randn(20, 2).double(), torch.arange(20) % 3
    held = h + F.one_hot(labels, 3).double() @ torch.randn(3, 2).double()
    told = LinearEstimator(spec(2), num_classes=3).double()
    untold = LinearEstimator(spec(2)).double()
    assert float(representation_error(told, h, labels, held)) < 1e-12
    assert float(representation_error(untold, h, None, held)) > 0.1


def test_a_richer_class_comes_nearer_to_a_step():
    torch.manual_seed(0)
    h = torch.linspace(-2, 2, 20).double().unsqueeze(1)
    step = h.sign()
    linear = representation_error(LinearEstimator(spec(1)).double(), h, None, step)
    torch.manual_seed(0)
    mlp = MLPEstimator(spec(1), hidden_sizes=(16,), batch_norm=False).double()
    before = [p.clone() for p in mlp.parameters()]
    rich = representation_error(mlp, h, None, step)
    assert float(linear) > 0.3
    assert float(rich) < 0.02
    for p, kept in zip(mlp.parameters(), before, strict=True):
        assert_close(p, kept, rtol=0, atol=0)


def test_an_estimator_that_fits_no_gradient_is_refused():
    critic = CriticEstimator(spec(2), num_classes=2).double()
    h = torch.randn(4, 2).double()
    with pytest.raises(EstimatorError, match=r"learns the gradient itself, but got CriticEstimator"):
        representation_error(critic, h, torch.zeros(4, dtype=torch.long), h)
