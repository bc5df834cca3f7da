"""The loss that an estimator implements, against potentials integrated by hand; claim 13 reduced."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from core.nets import unchecked
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.analysis import (
    GradientField,
    LinearMap,
    LossSurfaces,
    artificial_data,
    implicit_loss,
    loss_surfaces,
    plane,
    quadratic_loss,
)
from lightning_dni.core import BoundarySpec, DNIEngine, GradientEstimator, LeafSpec
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator, LocalLossEstimator


class Field(GradientEstimator):
    """A field that the test knows."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def synthesize(self, h, context, state):
        return (self.rule(h[0]),), None


def known_field(h):
    """The gradient of x^2 y + exp(x) + cos(y)."""
    x, y = h.unbind(1)
    return torch.stack([2 * x * y + x.exp(), x.square() - y.sin()], 1)


def potential(h):
    x, y = h.double().unbind(1)
    return x.square() * y + x.exp() + y.cos()


def test_a_known_potential_is_found_but_for_its_constant():
    h = torch.randn(20, 2)
    found = implicit_loss(GradientField(Field(known_field)), h, points=301)
    assert_close(found, potential(h) - 2.0, rtol=0, atol=2e-4)
    start = torch.tensor([0.5, -0.5])
    found = implicit_loss(GradientField(Field(known_field)), h, start=start, points=301)
    assert_close(found, potential(h) - potential(start[None]), rtol=0, atol=2e-4)


def test_the_work_of_a_curl_depends_on_the_way():
    turn = Field(lambda h: torch.stack([-h[:, 1], h[:, 0]], 1))
    h = torch.tensor([[1.0, 1.0]])
    assert float(implicit_loss(GradientField(turn), h)) == 0  # none along rays from zero
    assert float(implicit_loss(GradientField(turn), h, start=torch.tensor([1.0, 0.0]))) == pytest.approx(1.0)


def linear(features=3, classes=2):
    torch.manual_seed(0)
    estimator = LinearEstimator(
        BoundarySpec("h", (LeafSpec((features,), torch.float32),)), num_classes=classes
    )
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    return estimator


def test_the_closed_form_of_a_linear_one_is_its_path_integral_and_of_the_symmetric_part():
    estimator, h, labels = linear(), torch.randn(9, 3), torch.arange(9) % 2
    synthesizer = LinearMap(*(t.double() for t in LinearMap.of(estimator)))
    y = F.one_hot(labels, 2).double()
    found = quadratic_loss(synthesizer, h.double(), y)
    assert_close(found, implicit_loss(GradientField(estimator), h, labels), rtol=0, atol=1e-12)
    symmetric = synthesizer._replace(A=(synthesizer.A + synthesizer.A.t()) / 2)
    assert_close(found, quadratic_loss(symmetric, h.double(), y))
    at = h.double().requires_grad_()
    (gradient,) = torch.autograd.grad(quadratic_loss(synthesizer, at, y).sum(), at)
    assert_close(gradient, symmetric(h.double(), y))


def test_a_local_loss_is_found_again():
    torch.manual_seed(0)
    spec = BoundarySpec("h", (LeafSpec((3,), torch.float32),))
    estimator = LocalLossEstimator(spec, num_classes=2, hidden_sizes=(8,))
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    h, labels = torch.randn(9, 3), torch.arange(9) % 2
    found = implicit_loss(GradientField(estimator), h, labels, points=501)
    own = partial(F.cross_entropy, reduction="none")
    twin = estimator.double().head
    expected = own(twin(h.double(), False), labels) - own(twin(torch.zeros(9, 3).double(), False), labels)
    assert_close(found, expected.detach(), rtol=0, atol=5e-3)  # its gradient jumps at every ReLU


# ---- over a plane


def test_the_plane_is_a_grid_between_its_corners():
    assert plane((0.0, -1.0), (1.0, 1.0), side=3).tolist() == [
        [a, b] for a in (0.0, 0.5, 1.0) for b in (-1.0, 0.0, 1.0)
    ]


def test_surfaces_are_of_the_model_and_the_estimators_and_leave_both_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[2].eval()
    estimator, points = linear(), plane((-1.0, -1.0), (1.0, 1.0), side=4)
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    own = partial(F.cross_entropy, reduction="none")
    surfaces = loss_surfaces(model, {"1": estimator}, points, 2, own)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, False, True]
    assert not model[1]._forward_hooks
    with torch.no_grad():
        h = model.eval()[:2](points).double()
        output = model(points)
    synthesizer = LinearMap(*(t.double() for t in LinearMap.of(estimator)))
    for k in range(2):
        labels = torch.full((16,), k)
        assert_close(surfaces.true[k], own(output, labels).double())
        expected = quadratic_loss(synthesizer, h, F.one_hot(labels, 2).double())
        assert_close(surfaces.implicit["1"][k], expected, rtol=0, atol=1e-12)


def test_surfaces_of_a_linear_one_have_no_work_of_its_curl_and_those_of_others_that_from_the_mean():
    turn, points = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), plane((0.0, 0.0), (2.0, 1.0), side=3)
    linear_turn = LinearEstimator(BoundarySpec("h", (LeafSpec((2,), torch.float32),)))
    linear_turn.map.weight.data = turn
    both = {"0": linear_turn, "1": Field(lambda h: h @ turn.t().to(h))}
    model = nn.Sequential(nn.Identity(), nn.Identity())
    surfaces = loss_surfaces(model, both, points, 2)
    assert torch.equal(surfaces.implicit["0"], torch.zeros(2, 9).double())  # A is antisymmetric
    x, y = points.double().unbind(1)
    assert_close(surfaces.implicit["1"][0], y - x / 2)  # from (1, 1/2)


def test_correlations_are_numpys_within_each_class():
    torch.manual_seed(0)
    true, implicit = torch.randn(3, 30).double(), torch.randn(3, 30).double()
    implicit[2] = 1.5
    implicit[1] = 4 * true[1] - 7
    surfaces = LossSurfaces(torch.zeros(30, 2), true, {"h": implicit})
    found = surfaces.correlations()["h"].tolist()
    assert found == pytest.approx([np.corrcoef(true[0], implicit[0])[0, 1], 1.0, 0.0])


def test_correlations_need_a_true_loss():
    surfaces = LossSurfaces(torch.zeros(4, 2), None, {"h": torch.zeros(2, 4).double()})
    with pytest.raises(ValueError, match=r"Expected the true loss, but got None"):
        surfaces.correlations()


def test_a_boundary_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(BoundaryError, match=r"cross each boundary once .* at \['layer'\]"):
        loss_surfaces(Twice(), {"layer": linear(2)}, plane((0.0, 0.0), (1.0, 1.0), side=2), 2)


def trained(kind, loss_of, steps=300):
    """Six hidden layers, one linear synthetic gradient on top, Adam; claim 13's net, reduced."""
    torch.manual_seed(0)
    x, y = artificial_data(kind, 2, rows=200, dtype=torch.float32)
    labels = y.squeeze(1).long()
    widths = [2, *[16] * 6]
    hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    model = nn.Sequential(*hidden, nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    estimator = partial(LinearEstimator, num_classes=2)
    engine = DNIEngine(model, ["5"], estimator, estimator_optimizer=partial(torch.optim.Adam, lr=1e-2))
    with unchecked(), engine:
        for _ in range(steps):
            optimizer.zero_grad()
            with engine.training_step((x, labels)):
                loss = loss_of(model(x), labels).mean()
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
        return loss_surfaces(model, engine.estimators, plane((-2.0, -2.0), (2.0, 2.0)), 2, loss_of)


def half_squares(output, labels):
    return (output - F.one_hot(labels, 2)).square().sum(1) / 2


def test_a_linear_module_implements_the_squared_error_and_the_log_loss_less_well():
    squared = trained("noisy", half_squares).correlations()["5"]
    log = trained("noisy", partial(F.cross_entropy, reduction="none")).correlations()["5"]
    assert float(squared.min()) > 0.99
    assert float(log.min()) < float(squared.min())
