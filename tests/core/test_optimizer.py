"""Estimators are stepped by optimizers of their own, one per factory."""

from functools import partial

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS, attached, blobs, mlp, run_step, unchecked, weights
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

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


def test_what_is_built_later_has_an_optimizer_and_a_schedule_of_its_own():
    optimizers = EstimatorOptimizers(SGD, ["a", "b"], partial(StepLR, step_size=1, gamma=0.5))
    for name in ("b", "a"):
        optimizers.add(name, installed())
        optimizers.step()
        optimizers.advance()
    assert [g["boundaries"] for o in optimizers for g in o.param_groups] == [["b"], ["a"]]
    rates = [o.param_groups[0]["lr"] / o.defaults["lr"] for o in optimizers]
    assert rates == [0.25, 0.5]


def test_the_gradients_of_each_estimator_are_clipped_by_themselves():
    optimizers = EstimatorOptimizers(partial(torch.optim.SGD, lr=1.0), ["a", "b"], clip_norm=2.0)
    steep, flat = installed(), installed()
    for name, one, gradient in (("a", steep, 30.0), ("b", flat, 0.01)):
        optimizers.add(name, one)
        for parameter in one.parameters:
            torch.nn.init.zeros_(parameter)
            parameter.grad = torch.full_like(parameter, gradient)
    optimizers.step()
    moved = torch.cat([p.detach().flatten() for p in steep.parameters])
    torch.testing.assert_close(moved.norm(), torch.tensor(2.0))
    assert all(torch.equal(p, torch.full_like(p, -0.01)) for p in flat.parameters)


def test_schedules_are_restored_and_missing_ones_refused():
    def made(schedule):
        optimizers = EstimatorOptimizers(SGD, ["a"], schedule)
        optimizers.add("a", installed())
        optimizers.make()
        return optimizers

    halving = partial(StepLR, step_size=2, gamma=0.5)
    saved, restored = made(halving), made(halving)
    for _ in range(3):
        saved.step()
        saved.advance()
    restored.load_schedules(saved.schedules())
    assert restored.schedules() == saved.schedules()
    with pytest.raises(EstimatorError, match=r"kinds \[\], but got \['StepLR'\].*`estimator_scheduler`"):
        made(None).load_schedules(saved.schedules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip_norm": 0.0}, r"`estimator_clip_norm` to be a norm above 0, or None, but got 0\.0"),
        ({"clip_norm": float("nan")}, "`estimator_clip_norm` to be a norm above 0"),
        ({"schedule": ReduceLROnPlateau}, "`estimator_scheduler` to make .* but got ReduceLROnPlateau"),
    ],
)
def test_what_cannot_schedule_or_clip_is_refused(options, match):
    with pytest.raises(EstimatorError, match=match):
        made_with(**options)


def made_with(**options):
    optimizers = EstimatorOptimizers(SGD, ["a"], **options)
    optimizers.add("a", installed())
    optimizers.make()


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
