"""The counter-example of supplement A: where a constant module stops, and what takes the trap away."""

import pytest
import torch
from core.nets import unchecked
from torch import nn
from torch.testing import assert_close

from lightning_dni.analysis import descend, loss_surface, stationarity
from lightning_dni.analysis.counter_example import DATA, absolute_loss, is_spurious, residuals_at
from lightning_dni.core import GradientEstimator, sg_loss


class Constant(GradientEstimator):
    """SG = c for every row."""

    regresses = True

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(torch.tensor([c], dtype=torch.float64))

    def synthesize(self, h, context, state):
        return (self.c.expand_as(h[0]),), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


class Sign(Constant):
    """SG = c sign(f)."""

    def synthesize(self, h, context, state):
        return (self.c * h[0].sign(),), None


def point(a, b, estimator):
    """The stationarity of a point by autograd, on real modules."""
    below = nn.Linear(1, 1).double()
    with torch.no_grad():
        below.weight.fill_(a)
        below.bias.fill_(b)
    x = torch.tensor(DATA, dtype=torch.float64).unsqueeze(1)
    return stationarity(below, nn.Identity(), estimator, x, None, lambda p: p.abs().sum(1))


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (1.0, 0.5), (-2.0, 0.9), (0.1, -0.05)])
def test_the_spurious_region_is_stationary_for_the_pair_and_not_for_backprop(a, b):
    found = point(a, b, Constant(0.0))
    assert float(found.joint) < 1e-15
    assert float(found.original) == pytest.approx(6 / 4)  # of the mean over four rows
    assert bool(is_spurious(*torch.tensor([a, b], dtype=torch.float64)))


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 3.0, 0.0), (1.0, 0.5, 0.3), (0.5, -1.2, 0.0)])
def test_outside_of_it_the_pair_moves_on(a, b, c):
    assert float(point(a, b, Constant(c)).joint) > 1e-3
    assert bool(is_spurious(*torch.tensor([a, b], dtype=torch.float64))) == (abs(b) < abs(a))


def test_a_module_that_sees_the_sign_has_no_spurious_point():
    found = point(1.0, 0.5, Sign(1.0))
    assert float(found.estimator) < 1e-15
    assert float(found.below) == pytest.approx(float(found.below_true)) == pytest.approx(6 / 4)


@pytest.mark.parametrize(
    ("module", "given", "sg"),
    [
        ("constant", (0.0, 4 * 0.3), 2 * abs(0.3 - 0.5)),  # signs -, +, +, + have the mean 0.5
        ("sign", (0.3 * 4.0, 0.3 * 2.0), 2 * abs(0.3 - 1)),
        ("none", (4.0, 2.0), 0.0),
    ],
)
def test_the_residuals_at_a_point_are_those_by_hand(module, given, sg):
    """a = 1, b = 1.5, c = 0.3: f is -0.5, 0.5, 2.5, 3.5; all in units of the mean over four rows."""
    found = residuals_at(torch.tensor([1.0, 1.5, 0.3], dtype=torch.float64), module)
    assert float(found.above) == 0
    assert float(found.below) == pytest.approx((given[0] ** 2 + given[1] ** 2) ** 0.5 / 4)
    assert float(found.estimator) == pytest.approx(sg)
    assert float(found.below_true) == pytest.approx((4.0**2 + 2.0**2) ** 0.5 / 4)


@pytest.mark.parametrize("start", [(1.0, 0.5, 0.0), (1.0, 3.0, 0.0), (1.0, 0.5, 0.3)])
def test_a_constant_module_gets_stuck_at_six_where_others_reach_zero(start):
    stuck, true, sign = (descend(start, module, steps=2000) for module in ("constant", "none", "sign"))
    assert float(stuck.losses[-1]) == pytest.approx(6.0, abs=1e-9)
    assert stuck.parameters[-1, 0] == 1.0  # sum of the inputs is zero: the slope never moves
    assert float(true.losses[-1]) < 0.02
    assert float(sign.losses[-1]) < 0.02
    assert true.parameters[-1, 2] == start[2]


def test_each_step_is_the_gradient_that_autograd_finds():
    run = descend((0.7, 0.4, 0.3), "sign", steps=4, learning_rate=0.1, decay=0.9)
    x = torch.tensor(DATA, dtype=torch.float64)
    state = torch.tensor([0.7, 0.4, 0.3], dtype=torch.float64)
    for step in range(4):
        a, b, c = (each.clone().requires_grad_() for each in state)
        f = a * x + b
        true = f.detach().sign()
        given = c.detach() * true
        sg = (c * true - true).square().sum() / 2
        gradient = [*torch.autograd.grad(f, [a, b], given), *torch.autograd.grad(sg, [c])]
        state = state - 0.1 * 0.9**step * torch.stack(gradient)
        assert_close(run.parameters[step + 1], state, rtol=0, atol=1e-14)


def test_the_surface_is_the_loss_at_every_grid_point():
    surface = loss_surface(reach=2.0, points=5)
    assert surface.a.tolist() == surface.b.tolist() == [-2, -1, 0, 1, 2]
    for i, a in enumerate(surface.a.tolist()):
        for j, b in enumerate(surface.b.tolist()):
            assert float(surface.loss[i, j]) == sum(abs(a * x + b) for x in DATA)
            assert bool(surface.spurious[i, j]) == (abs(b) < abs(a))
    inside = torch.tensor([0.3], dtype=torch.float64)
    assert float(absolute_loss(inside, inside / 2)) == pytest.approx(6 * 0.3)


def test_another_module_is_refused():
    with (
        unchecked(),
        pytest.raises(ValueError, match=r"Expected `module` to be 'constant', 'sign' or 'none'"),
    ):
        descend((1.0, 1.0, 0.0), "linear")
