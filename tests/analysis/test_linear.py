"""Closed forms of the linear synthetic gradient: fitted ones and trained ones find them (claims 7 and 8)."""

from functools import partial

import pytest
import torch
from core.nets import unchecked
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.analysis import (
    LinearMap,
    fit_linear_map,
    log_loss_map,
    softmax_map,
    squared_error_map,
    squared_error_map_below,
)
from lightning_dni.core import BoundarySpec, DNIEngine, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gradient_at(losses, h):
    h = h.clone().requires_grad_()
    return torch.autograd.grad(losses(h).sum(), h)[0]


def half_squares(p, y):
    return (p - y).square().sum(1) / 2


def near(found, expected, atol):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=atol)


def test_squared_error_is_i_minus_i_zero_at_the_output():
    p, y = normal(40, 3), normal(40, 3)
    true = gradient_at(lambda p: half_squares(p, y), p)
    assert_close(squared_error_map(3)(p, y), true)
    near(fit_linear_map(p, y, true), squared_error_map(3), 1e-12)


def test_below_a_linear_map_it_is_wwt_minus_wt_bwt():
    w, b, h, y = normal(4, 3), normal(3), normal(40, 4), normal(40, 3)
    true = gradient_at(lambda h: half_squares(h @ w + b, y), h)
    assert_close(squared_error_map_below(w, b)(h, y), true)
    near(fit_linear_map(h, y, true), squared_error_map_below(w, b), 1e-11)


def test_log_loss_near_zero_is_a_quarter_minus_one_a_half():
    p, y = 0.05 * normal(4000, 1), torch.randint(2, (4000, 1)).double()
    true = gradient_at(lambda p: F.binary_cross_entropy_with_logits(p, y, reduction="none"), p)
    near(fit_linear_map(p, y, true), log_loss_map(), 1e-3)


@pytest.mark.parametrize("classes", [2, 5])
def test_softmax_near_zero(classes):
    p, labels = 0.01 * normal(4000, classes), torch.randint(classes, (4000,))
    true = gradient_at(lambda p: F.cross_entropy(p, labels, reduction="none"), p)
    y = F.one_hot(labels, classes).double()
    found, expected = fit_linear_map(p, y, true), softmax_map(classes)
    # one-hot labels add up to one, and so does what the map says of them: B + C is what counts
    near((found.A, found.B + found.C), (expected.A, expected.B + expected.C), 1e-3)
    assert_close(expected(p, y), true, rtol=0, atol=1e-3)


def test_a_class_too_few_is_refused():
    with pytest.raises(EstimatorError, match=r"Expected `num_classes` to be at least 2, but got 1"):
        softmax_map(1)


@pytest.mark.parametrize("context", ["vectors", "labels", None])
def test_a_linear_estimator_is_read_off_as_it_speaks(context):
    options = {"vectors": {"context_size": 2}, "labels": {"num_classes": 2}, None: {}}[context]
    spec = BoundarySpec("h", (LeafSpec((3,), torch.float64),))
    estimator = LinearEstimator(spec, **options).double()
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    h, labels, vectors = normal(6, 3), torch.randint(2, (6,)), normal(6, 2)
    told = {"vectors": vectors, "labels": labels, None: None}[context]
    y = {"vectors": vectors, "labels": F.one_hot(labels, 2).double(), None: normal(6, 0)}[context]
    found = LinearMap.of(estimator)
    assert_close(found(h, y), estimator.synthesize((h,), told, None)[0][0].detach())
    estimator.map.weight.data.zero_()
    assert found.A.any()


def test_training_finds_the_closed_form_below_a_frozen_linear_map():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double().requires_grad_(False)
    upper = model[1]
    engine = DNIEngine(
        model,
        ["0"],
        partial(LinearEstimator, context_size=2),
        estimator_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    with unchecked(), engine:
        for _ in range(400):
            h, y = normal(64, 3).requires_grad_(), normal(64, 2)
            with engine.training_step((h, y)):
                loss = half_squares(model(h), y).mean()
            engine.backward(loss)
            engine.update_estimators()
    expected = squared_error_map_below(upper.weight.t(), upper.bias)
    for found, exact in zip(LinearMap.of(engine.estimators["0"]), expected, strict=True):
        assert (found - exact).norm() / exact.norm() < 1e-3
