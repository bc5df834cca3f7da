"""Estimators are stepped by optimizers of their own, one per factory."""

from functools import partial

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS, attached, blobs, mlp, run_step, unchecked, weights
from torch import nn

from lightning_dni.core import BoundarySpec
from lightning_dni.core.estimator import Installed
from lightning_dni.core.optimizer import EstimatorOptimizers
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import LinearEstimator, ZeroEstimator

SGD, ADAM = partial(torch.optim.SGD, lr=0.5), partial(torch.optim.Adam, lr=0.1)
SPEC = BoundarySpec.of("b", [torch.zeros(8, 4)])


def installed(make=LinearEstimator):
    estimator = make(SPEC)
    return Installed(estimator, tuple(estimator.parameters()))


def test_boundaries_of_one_factory_share_an_optimizer():
    optimizers = EstimatorOptimizers({"a*": SGD, "*": ADAM}, ["a1", "a2", "b"])
    for name in ("a1", "a2", "b"):
        optimizers.add(name, installed())
    kinds = [(type(o), [g["boundaries"] for g in o.param_groups]) for o in optimizers]
    assert kinds == [(torch.optim.SGD, [["a1", "a2"]]), (torch.optim.Adam, [["b"]])]


def test_an_estimator_is_taken_over_once():
    optimizers, learner = EstimatorOptimizers(SGD, ["b"]), installed()
    optimizers.add("b", learner)
    optimizers.add("b", learner)
    (optimizer,) = optimizers
    assert len(optimizer.param_groups) == 1


def test_what_learns_nothing_needs_no_optimizer():
    optimizers = EstimatorOptimizers(SGD, ["b"])
    optimizers.add("b", installed(ZeroEstimator))
    assert list(optimizers) == []


def test_a_step_uses_the_gradients_up():
    optimizers, learner = EstimatorOptimizers(SGD, ["b"]), installed()
    optimizers.add("b", learner)
    learner.parameters[0].grad = torch.ones_like(learner.parameters[0])
    optimizers.step()
    assert torch.equal(learner.parameters[0].data, torch.full((4, 4), -0.5))
    assert learner.parameters[0].grad is None


def test_what_makes_no_optimizer_is_refused():
    optimizers = EstimatorOptimizers(lambda groups: nn.Linear(1, 1), ["b"])
    optimizers.add("b", installed())
    with unchecked(), pytest.raises(EstimatorError, match=r"`estimator_optimizer` to make.*but got Linear"):
        optimizers.make()


def test_what_is_built_later_has_a_group_of_its_own():
    optimizers = EstimatorOptimizers(ADAM, ["a", "b"])
    for name in ("b", "a"):
        optimizers.add(name, installed())
        optimizers.step()
    (optimizer,) = optimizers
    assert [g["boundaries"] for g in optimizer.param_groups] == [["b"], ["a"]]


def test_a_boundary_without_a_factory_is_refused():
    with pytest.raises(BoundaryError, match="pattern in `estimator_optimizer` to match boundary 'b'"):
        EstimatorOptimizers({"a": SGD}, ["a", "b"])


def test_another_number_of_states_is_refused():
    optimizers = EstimatorOptimizers(SGD, ["b"])
    optimizers.add("b", installed())
    with pytest.raises(EstimatorError, match=r"for the estimators at \['b'\], but got them for \[\]"):
        optimizers.load_state_dict([])


def test_estimators_that_share_an_optimizer_in_another_way_are_refused():
    one, two = EstimatorOptimizers(SGD, ["a", "b"]), EstimatorOptimizers({"a": SGD, "b": ADAM}, ["a", "b"])
    for optimizers in (one, two):
        for name in ("a", "b"):
            optimizers.add(name, installed())
    with pytest.raises(EstimatorError, match="2 states of estimator optimizers, but got 1"):
        two.load_state_dict(one.state_dict())


def test_every_pattern_steps_at_its_own_rate():
    model, batch = mlp(), blobs()
    rates = {"0": partial(torch.optim.SGD, lr=0.0), "1": partial(torch.optim.SGD, lr=0.25)}
    engine = attached(model, ["0", "1"], VECTOR_ESTIMATORS["linear"], estimator_optimizer=rates)
    run_step(engine, model, batch)
    gradient = engine.estimators["1"].map.weight.grad.clone()
    assert gradient.abs().max() > 0
    engine.update_estimators()
    torch.testing.assert_close(engine.estimators["1"].map.weight.data, -0.25 * gradient, rtol=0, atol=1e-16)
    assert not any(t.any() for t in weights(engine.estimators["0"]).values())
