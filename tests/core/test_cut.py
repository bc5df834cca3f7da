"""What a crossing applies to the stage below, and whose crossings count."""

import pytest
import torch
from core.nets import Told
from torch import nn

from lightning_dni.core import BoundarySpec
from lightning_dni.core.cut import Cut, lineage
from lightning_dni.core.estimator import Installed
from lightning_dni.core.stage import Stage

H = torch.randn(4, 3, dtype=torch.float64)
GIVEN, ARRIVED = torch.randn_like(H), torch.randn_like(H)


def cut(parents=(), bp_lambda=0.0, synthetic=None, arrived=None, waits=None):
    installed = Installed(Told(BoundarySpec.of("b", [H])), ())
    waits = bp_lambda > 0 if waits is None else waits
    made = Cut(
        "b",
        installed,
        [H],
        [H.clone().requires_grad_()],
        Stage([], list(parents)),
        0.25,
        bp_lambda,
        waits,
        False,
    )
    made.synthetic = None if synthetic is None else (synthetic,)
    made.arrived = None if arrived is None else [arrived]
    return made


@pytest.mark.parametrize("bp_lambda", [0.0, 0.25, 0.5, 1.0])
def test_the_applied_gradient_is_the_mixture_in_units_of_the_loss(bp_lambda):
    (applied,) = cut((), bp_lambda, GIVEN, ARRIVED, waits=True).applied_gradient()
    torch.testing.assert_close(applied, (1 - bp_lambda) * GIVEN / 4 + bp_lambda * ARRIVED, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bp_lambda", [0.25, 0.5])
def test_what_is_missing_counts_as_zero(bp_lambda):
    (from_above,) = cut((), bp_lambda, None, ARRIVED).applied_gradient()
    (from_estimator,) = cut((), bp_lambda, GIVEN, None).applied_gradient()
    torch.testing.assert_close(from_above, bp_lambda * ARRIVED, rtol=0, atol=1e-15)
    torch.testing.assert_close(from_estimator, (1 - bp_lambda) * GIVEN / 4, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5, 1.0])
def test_nothing_from_anywhere_is_no_gradient(bp_lambda):
    assert cut((), bp_lambda).applied_gradient() is None


def test_full_lambda_ignores_the_estimator_where_nothing_arrived():
    assert cut((), 1.0, GIVEN, None).applied_gradient() is None


def test_what_arrived_is_taken_away_from_the_boundary_tensor():
    made = cut()
    (made.leaves[0] * ARRIVED).sum().backward()
    made.take_arrived()
    assert torch.equal(made.arrived[0], ARRIVED)
    assert made.leaves[0].grad is None


def test_a_leaf_that_nothing_came_back_to_counts_as_zero():
    made = cut()
    made.leaves.append(torch.ones(4, 2, dtype=torch.float64, requires_grad=True))
    (made.leaves[0] * ARRIVED).sum().backward()
    made.take_arrived()
    assert torch.equal(made.arrived[1], torch.zeros(4, 2, dtype=torch.float64))


def test_the_target_is_in_units_of_the_row_and_in_single_precision_at_least():
    made = cut(arrived=ARRIVED)
    torch.testing.assert_close(made.target_gradient()[0], ARRIVED * 4, rtol=0, atol=1e-15)
    made.leaves, made.arrived = [H.bfloat16().requires_grad_()], [ARRIVED.bfloat16()]
    assert made.target_gradient()[0].dtype == torch.float32


def test_lineage_is_everything_below_the_top():
    bottom = cut()
    left, right, other = cut([bottom]), cut(), cut()
    top = cut([left, right])
    assert lineage([top]) == {bottom, left, right, top}
    assert lineage([other]) == {other}
    assert lineage([]) == set()


def test_an_estimator_is_named_with_its_place():
    assert isinstance(cut().installed.estimator, nn.Module)
    assert cut().who == "Told at boundary 'b'"
