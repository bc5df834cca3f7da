"""Synthetic inputs: what they cannot be made for is refused by name, and where a batch's input is found."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, attached, run_step, same_bits, unchecked, update
from core.predicted import (
    LINEAR,
    NAMES,
    SMALL,
    Constant,
    batches,
    engine_of,
    inputs_of,
    net,
    sgd,
    trained,
)
from torch import nn

from lightning_dni import MLPInputEstimator
from lightning_dni.core import DNIEngine
from lightning_dni.core.context import find_input
from lightning_dni.errors import BoundaryError, EstimatorError, StageError
from lightning_dni.estimators import BackpropEstimator, LinearEstimator


@pytest.mark.parametrize(
    ("factories", "message"),
    [
        (Constant, "Expected the state of a Constant for the inputs at boundary '0', but got that of a MLP"),
        ({"0": SMALL, "*": None}, "Expected no input estimator at boundary '1', but the state has one"),
        (
            MLPInputEstimator,
            "inputs at boundary '0', but got one that does not fit: .*Resume with the `synth",
        ),
    ],
    ids=["another kind", "another boundary", "another width"],
)
def test_another_state_is_refused_and_changes_nothing(factories, message):
    engine, _ = trained(net(), batches(2))
    model = net()
    other = engine_of(model, factories)
    run_step(other, model, batches(1)[0])
    before = inputs_of(other)
    with pytest.raises(EstimatorError, match=message):
        other.load_state_dict(engine.state_dict())
    assert same_bits(inputs_of(other), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bp_lambda": 0.5},
            r"got bp_lambda=0.5 for LinearEstimator at boundary '0'. Pass synthetic_inputs=",
        ),
        ({"estimator": BackpropEstimator}, "got BackpropEstimator at boundary '0'. Pass synthetic_inputs="),
        ({"factories": LINEAR}, "make an InputEstimator for boundary '0', but got LinearEstimator. Pass MLP"),
        (
            {"factories": partial(Constant, rows=2)},
            r"predict tensors of shapes \[\(5, 6\)\], but got \[\(2, 6\)\]",
        ),
        (
            {"network_input": 1},
            "Expected `network_input=1` to give a floating-point tensor .* got torch.int64",
        ),
        (
            {"input_optimizer": lambda p: None},
            "Expected `input_optimizer` to make a torch optimizer .* NoneType",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_refused(options, message):
    model = net()
    with unchecked(), pytest.raises(EstimatorError, match=message):
        update(engine_of(model, **options), model, sgd(model.parameters()), batches(1))


def test_a_boundary_that_runs_twice_is_refused():
    model, ((x, y),) = net(), batches(1)
    engine = engine_of(model)
    with (
        engine.training_step((x, y)),
        pytest.raises(EstimatorError, match="boundary '0' to run once in a step"),
    ):
        model(x) + model(x)


def test_probes_several_losses_and_boundaries_without_a_pattern_are_refused():
    model, ((x, y),) = net(), batches(1)
    engine = engine_of(model)
    with pytest.raises(StageError, match=r"no probe of true gradients .*GradientMonitor\(probe=False\)"):
        engine.request_probe()
    with pytest.raises(StageError, match="one loss per training step with synthetic inputs"):
        run_step(engine, model, (x, y), several_losses=True)
    with pytest.raises(BoundaryError, match="a pattern in `synthetic_inputs` to match boundary '1'"):
        DNIEngine(net(), NAMES, LINEAR, synthetic_inputs={"0": SMALL})


def test_what_is_not_finite_is_named_or_left_out():
    model, ((x, y),) = net(batch_norm=False), batches(1)
    x[0, 0] = float("inf")
    with pytest.raises(
        EstimatorError, match="Expected finite activations and synthetic inputs at boundary '0'"
    ):
        run_step(engine_of(model), model, (x, y))
    model = net(batch_norm=False)
    engine, user = engine_of(model, on_nonfinite="skip"), sgd(model.parameters())
    update(engine, model, user, batches(1))
    before = inputs_of(engine)
    with engine.training_step((x, y)):
        model(x)
    assert all(torch.equal(v, before[n]) for n, v in inputs_of(engine).items() if "running" not in n)


@pytest.mark.parametrize(
    ("batch", "where", "expected"),
    [
        ((torch.ones(2), torch.zeros(2)), "auto", 1.0),
        ({"label": torch.zeros(2), "image": torch.ones(2)}, "auto", 1.0),
        (torch.ones(2), "auto", 1.0),
        ((torch.zeros(2), torch.ones(2)), 1, 1.0),
        ({"a": torch.ones(2, dtype=torch.uint8)}, "a", 1),
        ([{"a": torch.ones(2)}], lambda batch: batch[0]["a"], 1.0),
    ],
    ids=["tuple", "mapping", "tensor", "index", "key", "callable"],
)
def test_the_network_input_is_found(batch, where, expected):
    assert (find_input(batch, where) == expected).all()


def test_an_input_of_another_shape_is_refused_by_name():
    """torch said that two matrices cannot be multiplied."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, CLASSES))
    engine = attached(model, ["0"], LinearEstimator, synthetic_inputs=MLPInputEstimator)
    run_step(engine, model, (torch.randn(8, 4, 5), None), lambda out, y: out.square().mean())
    expected = r"rows of shape \(4, 5\) of the network's input for the MLPInputEstimator at .*'0'.* \(7, 5\)"
    with pytest.raises(EstimatorError, match=expected):
        run_step(engine, model, (torch.randn(8, 7, 5), None), lambda out, y: out.square().mean())


def test_a_batch_without_rows_is_predicted_too():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, CLASSES))
    engine = attached(model, ["0"], LinearEstimator, synthetic_inputs=MLPInputEstimator)
    for rows in (8, 0):
        run_step(engine, model, (torch.randn(rows, 5), None), lambda out, y: out.square().sum())
        engine.update_estimators()
    assert all(p.isfinite().all() for p in engine.input_estimators["0"].parameters())


def test_a_batch_without_input_is_refused():
    with pytest.raises(
        EstimatorError, match=r"`network_input='auto'` to give a floating-point .* got NoneType"
    ):
        find_input({"words": torch.ones(2)})
    with pytest.raises(EstimatorError, match="Expected `network_input='z'` to be in the batch, but got"):
        find_input({"words": torch.ones(2)}, "z")
