"""Sums over micro-batches: equal to the joint batch, and defined where a denominator is zero."""

import math

import pytest
import torch
from callbacks.twin import measure, measure_weights
from torch import nn
from torch.testing import assert_close

from lightning_dni.callbacks.window import BoundaryWindow
from lightning_dni.core import BoundaryReport, DNIEngine
from lightning_dni.core.sums import Spread
from lightning_dni.estimators import LinearEstimator


def report(synthetic, target, true=None, loss=None, regresses=True, applied=None, weights=None):
    return BoundaryReport(synthetic, target, true, loss, regresses, applied or {}, weights or {})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(synthetic, target):
    return (synthetic - target).square().sum(1).mean()


def computed(*reports):
    window = BoundaryWindow()
    for each in reports:
        window.update(each)
    return {name: value.item() for name, value in window.compute().items()}


def test_unequal_micro_batches_give_what_the_joint_batch_gives():
    synthetic, target, true = (random(9, 4, seed=k) + 1.0 for k in range(3))
    true[5] = 0
    applied, weights = random(2, 3, seed=3), random(2, 3, seed=4)
    parts = []
    for k, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 9))):
        s, t = synthetic[rows], target[rows]
        share = (0.5, 0.2, 0.3)[k]
        halves = {"applied": {"w": applied * share}, "weights": {"w": weights * share}}
        parts.append(report(s, t, true[rows], squared(s, t), **halves))
    expected = measure(*(g.numpy() for g in (synthetic, target, true)))
    expected |= measure_weights(applied.flatten().numpy(), weights.flatten().numpy())
    found = computed(*parts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_of_no_row_nothing_is_said_and_it_changes_nothing():
    none = report(random(0, 3), random(0, 3), loss=torch.zeros(()).double())
    s, t = random(4, 3), random(4, 3, seed=1)
    some = report(s, t, loss=squared(s, t))
    assert computed(none) == {}
    assert computed(none, some) == computed(some, none) == computed(some)


def test_without_true_gradients_only_the_target_is_compared():
    s, t = random(4, 3), random(4, 3, seed=1)
    assert computed(report(s, t, loss=squared(s, t))).keys() == {
        "dni_target_error",
        "dni_target_cosine",
        "dni_sg_loss",
    }


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 0.0), (2.0, math.inf)])
def test_loss_over_a_target_without_variance_is_defined(loss, expected):
    constant = torch.ones(4, 3)
    assert computed(report(constant, constant, loss=torch.tensor(loss)))["dni_sg_loss"] == expected


def test_loss_that_is_no_distance_to_the_target_stays_raw():
    parts = [report(random(n, 3), random(n, 3), loss=torch.tensor(float(n)), regresses=False) for n in (1, 3)]
    assert computed(*parts)["dni_sg_loss"] == pytest.approx((1 * 1 + 3 * 3) / 4)


def test_estimator_without_loss_has_no_sg_loss():
    assert "dni_sg_loss" not in computed(report(random(4, 3), random(4, 3, seed=1)))


def test_weight_without_a_gradient_counts_as_zero():
    one, two = torch.ones(2), torch.full((3,), 2.0)
    gradients = {"applied": {"a": one}, "weights": {"a": one, "b": two}}
    found = computed(report(one[:, None], one[:, None], one[:, None], **gradients))
    norm = math.sqrt(2 + 12)
    assert found["dni_weight_error"] == pytest.approx(math.sqrt(12) / norm)
    assert found["dni_weight_cosine"] == pytest.approx(math.sqrt(2) / norm)


def test_spread_does_not_cancel():
    values = random(1000, 2).float() + 1e4
    spread = Spread()
    for part in values.split([1, 299, 700]):
        spread.update(part)
    assert_close(spread.variance(), values.double().var(dim=0, correction=0).sum())


def test_spread_takes_rows_of_another_length_around_a_mean_of_their_own():
    short, long = random(4, 2), random(6, 3, seed=1) + 5
    spread = Spread()
    spread.update(short)
    spread.update(long)
    expected = sum(((v - v.mean(0)) ** 2).sum() for v in (short, long)) / 10
    assert_close(spread.variance(), expected)


def test_calls_of_different_lengths_are_one_report():
    """A boundary that runs twice in one forward, on sequences of different lengths."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.LazyLinear(2)).double()
    long, short = random(5, 6, 3), random(5, 2, 3, seed=1)
    engine = DNIEngine(model, ["0"], LinearEstimator, labels=None)
    with engine:
        engine.request_probe()
        with engine.training_step():
            inner = [model[0](x).mean(1) for x in (long, short)]
            loss = model[2](torch.cat(inner, 1)).square().sum(1).mean()
        engine.backward(loss)
        facts = engine.last_report.boundaries["0"]
    assert facts.synthetic.shape == facts.true.shape == (10, 24)
    assert_close(computed(facts)["dni_sg_error"], 1.0)
