"""Options of the wrong kind, or without effect, are refused when the engine is made, by name."""

from functools import partial

import pytest
import torch
from core.nets import mlp
from torch import nn

from lightning_dni.core import BoundarySpec, DNIEngine
from lightning_dni.core.target import denominator
from lightning_dni.errors import BoundaryError, EstimatorError, StageError
from lightning_dni.estimators import LinearEstimator, MLPEstimator

NAMES = ["1", "3"]
SPEC = BoundarySpec.of("1", [torch.zeros(2, 4)])


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("names", [[1], [None], [nn.ReLU()], 3, ["1", 3]])
def test_boundaries_are_names(names):
    with pytest.raises(
        BoundaryError, match="Expected `boundaries` to be a non-empty list of submodule names"
    ):
        DNIEngine(net(), names, LinearEstimator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "linear"}, "`estimator` to be a class .* boundary '1', but got 'linear'. Pass Linear"),
        ({"estimator": LinearEstimator(SPEC)}, "`estimator` to be a class .* but got one LinearEstimator"),
        (
            {"estimator": {"1": LinearEstimator, "*": None}},
            "`estimator` .* boundary '3', but got one NoneType",
        ),
        ({"estimator": [LinearEstimator] * 2}, "`estimator` to be a class .* but got one list"),
        ({"estimator_optimizer": "adam"}, r"`estimator_optimizer` .* but got 'adam'. Pass partial\(torch"),
        (
            {"estimator_optimizer": torch.optim.Adam([nn.Parameter(torch.zeros(1))])},
            "`estimator_optimizer` to be a class .* but got one Adam",
        ),
        ({"estimator_scheduler": "step"}, "`estimator_scheduler` to be a class .* but got 'step'"),
        ({"estimator_clip_norm": "1"}, "`estimator_clip_norm` to be a norm above 0, or None, but got '1'"),
        ({"estimator_steps": True}, "`estimator_steps` to be an integer of at least 1, but got True"),
        ({"synthetic_inputs": True}, "`synthetic_inputs` to be a class .* but got True. Pass MLPInput"),
        ({"damping": 0.5}, "Expected `truncations` beside `damping`, but got 0.5 alone"),
        ({"sequence_end": "ignore"}, "Expected `truncations` beside `sequence_end`, but got 'ignore'"),
    ],
)
def test_what_cannot_be_used_is_named_before_the_first_batch(options, message):
    with pytest.raises(EstimatorError, match=message):
        DNIEngine(net(), NAMES, **{"estimator": LinearEstimator, **options})


@pytest.mark.parametrize(
    ("argument", "right"),
    [
        ("estimator", LinearEstimator),
        ("estimator_optimizer", torch.optim.Adam),
        ("bp_lambda", 0.5),
        ("update_probability", 0.5),
    ],
)
def test_a_pattern_that_matches_no_boundary_is_not_passed_over(argument, right):
    options = {"estimator": LinearEstimator, argument: {"4": right, "*": right}}
    message = rf"the patterns in `{argument}` to match boundaries, but '4' matches none of \['1', '3'"
    with pytest.raises(BoundaryError, match=message):
        DNIEngine(net(), NAMES, **options)
    DNIEngine(net(), NAMES, **{**options, argument: {"1": right, "[3-9]": right}})


def test_an_optimizer_that_needs_a_closure_is_refused():
    model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
    engine = DNIEngine(model, ["1"], LinearEstimator, estimator_optimizer=torch.optim.LBFGS)
    with engine:
        with engine.training_step((x, None)):
            loss = model(x).square().mean()
        with pytest.raises(EstimatorError, match="to make an optimizer that steps without a closure"):
            engine.backward(loss)


@pytest.mark.parametrize("given", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_a_loss_is_divided_by_a_number_above_zero(given):
    with pytest.raises(EstimatorError, match="Expected `loss_denominator` to give what the loss was divided"):
        denominator(lambda batch, h: given, None, None, 4, None)


@pytest.mark.parametrize("sizes", [64, "64", [8.0], ["8"]])
def test_sizes_are_lists_of_integers(sizes):
    with pytest.raises(EstimatorError, match=r"Expected `hidden_sizes` to be .* but got"):
        partial(MLPEstimator, hidden_sizes=sizes)(SPEC)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("updates", [False, True])
def test_a_loss_that_the_engine_has_not_seen_is_refused_in_a_loop_of_the_users(inside, updates):
    model, x = net(), torch.randn(4, 3)
    engine = DNIEngine(model, NAMES, LinearEstimator)
    refused = pytest.raises(StageError, match=r"`engine.backward\(loss\)`, instead of `loss.backward\(\)`")
    with engine:
        with engine.training_step((x, None)):
            loss = model(x).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        with refused:
            engine.update_estimators() if updates else engine.training_step((x, None)).__enter__()


def test_a_forward_pass_without_a_backward_pass_is_none_of_its_business():
    model, x = net(), torch.randn(4, 3)
    with DNIEngine(model, NAMES, LinearEstimator) as engine:
        for _ in range(2):
            with engine.training_step((x, None)):
                model(x)
        engine.update_estimators()
        with engine.training_step((x, None)):
            loss = model(x).square().mean()
        engine.backward(loss)
        engine.update_estimators()
    assert model[0].weight.grad is not None
