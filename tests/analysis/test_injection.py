"""Errors of a chosen size in the true gradient, and what training makes of them (claim 9)."""

from functools import partial

import pytest
import torch
from core.nets import unchecked
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_dni.analysis import InjectedErrorEstimator, TrackingInstrument, tracking_condition
from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec, Lock, Record
from lightning_dni.errors import EstimatorError

SPEC = BoundarySpec("0", (LeafSpec((3,), torch.float32),))


def correct(estimator, target):
    return estimator.correct(Record((target,), None, None, None), Feedback(target=(target,)))[0]


@pytest.mark.parametrize("size", [0.0, 0.3, 2.0])
def test_the_error_has_the_size_that_was_asked_for(size):
    target = torch.randn(5, 3)
    random = [correct(InjectedErrorEstimator(SPEC, size), target) - target for _ in range(2)]
    assert float(random[0].norm() / target.norm()) == pytest.approx(size, rel=1e-5)
    assert torch.equal(*random)  # of the seed, the boundary and the number of calls alone
    opposed = correct(InjectedErrorEstimator(SPEC, size, "opposed"), target) - target
    torch.testing.assert_close(opposed, -size * target)


def test_every_call_draws_anew_and_goes_on_where_a_checkpoint_stopped():
    target, before = torch.randn(5, 3), torch.get_rng_state()
    estimator = InjectedErrorEstimator(SPEC, 0.5)
    first, second = correct(estimator, target), correct(estimator, target)
    assert not torch.equal(first, second)
    resumed = InjectedErrorEstimator(SPEC, 0.5)
    resumed.load_state_dict(estimator.state_dict())
    assert torch.equal(correct(resumed, target), correct(estimator, target))
    assert not torch.equal(correct(InjectedErrorEstimator(SPEC, 0.5, seed=1), target), first)
    assert torch.equal(before, torch.get_rng_state())


def test_it_says_what_it_waits_for():
    assert InjectedErrorEstimator.locks == {Lock.UPDATE, Lock.BACKWARD}
    assert not InjectedErrorEstimator(SPEC, 0.5).is_learned


@pytest.mark.parametrize("options", [{"relative_size": -0.1}, {"relative_size": 1.0, "direction": "up"}])
def test_strange_errors_are_refused(options):
    with unchecked(), pytest.raises(EstimatorError, match=r"`relative_size` of at least 0 and `direction`"):
        InjectedErrorEstimator(SPEC, **options)


# ---- in training


def digits():
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:300]).float() / 16, torch.from_numpy(y[:300])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(64, 32), nn.Tanh()), nn.Linear(32, 10))


def trained(estimator, steps=60, instrument=None):
    """Losses of full-batch descent, the model, and the conditions that were measured."""
    (x, y), model, losses, conditions = digits(), net(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = DNIEngine(model, ["0"], estimator)
    with unchecked(), engine:
        for step in range(steps):
            optimizer.zero_grad()
            if instrument is not None and step % 10 == 0:
                engine.request_probe(instrument)
            with engine.training_step((x, y)):
                loss = F.cross_entropy(model(x), y)
            engine.backward(loss)
            if engine.last_report is not None:
                report = engine.last_report.boundaries["0"]
                conditions.append(tracking_condition(report.measured[instrument], report.true_weights))
            optimizer.step()
            engine.update_estimators()
            losses.append(loss.item())
    return losses, model, conditions


def backprop(steps=60, frozen=False):
    (x, y), model, losses = digits(), net(), []
    optimizer = torch.optim.SGD(model[1].parameters() if frozen else model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def test_no_error_is_backprop():
    losses, model, _ = trained(partial(InjectedErrorEstimator, relative_size=0.0), steps=5)
    twin_losses, twin = backprop(steps=5)
    assert losses == pytest.approx(twin_losses, rel=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", ["random", "opposed"])
def test_where_the_condition_holds_training_ends_as_backprop_does(direction):
    slight = partial(InjectedErrorEstimator, relative_size=0.05, direction=direction)
    losses, _, conditions = trained(slight, instrument=TrackingInstrument())
    assert [bool(condition.held) for condition in conditions] == [True] * 6
    exact = backprop()[0][-1]
    assert losses[-1] != exact
    assert losses[-1] <= 1.05 * exact


@pytest.mark.parametrize(("direction", "worse"), [("random", 1.1), ("opposed", 1.3)])
def test_small_errors_converge_as_backprop_does_though_no_guarantee_may_hold(direction, worse):
    noisy = partial(InjectedErrorEstimator, relative_size=0.3, direction=direction)
    losses, _, conditions = trained(noisy, instrument=TrackingInstrument())
    assert losses[-1] < worse * backprop()[0][-1]
    fractions = [float(c.fraction) for c in conditions]
    assert len(fractions) == 6
    assert max(fractions) > 1  # sufficient, not necessary


def test_errors_above_one_against_the_gradient_make_the_stage_climb():
    opposed = partial(InjectedErrorEstimator, relative_size=2.0, direction="opposed")
    losses, _, conditions = trained(opposed, instrument=TrackingInstrument())
    assert losses[-1] > 1.5 * backprop(frozen=True)[0][-1]  # worse than to leave the stage alone
    assert losses[-1] > 3 * backprop()[0][-1]
    assert not any(bool(c.held) for c in conditions)
