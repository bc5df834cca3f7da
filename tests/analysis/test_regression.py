"""Theorem 1 and its limits: every step against numpy, every claim on a reduced size (claims 1, 3 and 8)."""

import numpy as np
import pytest
from core.nets import unchecked
from torch.testing import assert_close

from lightning_dni.analysis import (
    LinearMap,
    artificial_data,
    log_loss_map,
    regress,
    row_losses,
    squared_error_map,
)


def search(loss, high=1e4):
    """Where `loss` of one number is least, by ternary search: no formula is shared with what is tested."""
    low = 0.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return (low + high) / 2


def by_hand(x, y, log, steps, rate):
    """The run in numpy; gives the weights, the estimator and the losses."""
    n, d = x.shape
    w, b, m = np.zeros((d, 1)), 0.0, np.zeros(3)
    losses = []
    for _ in range(steps):
        p = x @ w + b
        true = 1 / (1 + np.exp(-p)) - y if log else p - y
        losses.append((np.logaddexp(0, p) - y * p if log else (p - y) ** 2 / 2).mean())
        z = np.hstack([p, y, np.ones_like(p)])
        direction = 2 * z.T @ (z @ m[:, None] - true) / n

        def sg_loss(t, m=m, z=z, true=true, direction=direction):
            return ((z @ (m[:, None] - t * direction) - true) ** 2).mean()

        m = m - search(sg_loss) * direction[:, 0]
        said = z @ m[:, None]
        w, b = w - rate * x.T @ said / n, b - rate * said.mean()
    return w, b, m, losses


@pytest.mark.parametrize("loss", ["mse", "log"])
def test_steps_are_those_of_a_line_search_by_hand(loss):
    x, y = artificial_data("noisy", 3, rows=50)
    run = regress(x, y, loss=loss, steps=8, learning_rate=0.2)
    w, b, m, losses = by_hand(x.numpy(), y.numpy(), loss == "log", 8, 0.2)
    assert_close(run.weight.numpy(), w, rtol=1e-6, atol=1e-8)
    assert float(run.bias) == pytest.approx(b, rel=1e-6)
    assert [float(each) for each in run.synthesizer] == pytest.approx(m.tolist(), rel=1e-5)
    assert run.losses[:-1].tolist() == pytest.approx(losses, rel=1e-8)


def global_loss(x, y):
    ones = np.hstack([x.numpy(), np.ones((len(x), 1))])
    return 0.5 * ((ones @ np.linalg.lstsq(ones, y.numpy(), rcond=None)[0] - y.numpy()) ** 2).mean()


@pytest.mark.parametrize("kind", ["separable", "noisy", "xor", "random"])
def test_theorem_1_network_and_sg_error_decrease_together_to_the_global_solution(kind):
    x, y = artificial_data(kind, 2, rows=100)
    with unchecked():
        run = regress(x, y, guarded=True, learning_rate=1.0, steps=600)
    sums = run.error_sums
    above_rounding = sums[:-1] > 1e-13
    assert (sums.diff()[above_rounding] < 0).all()
    assert float(run.losses[-1]) == pytest.approx(global_loss(x, y), abs=1e-5)
    assert ((run.rates[above_rounding[: len(run.rates)]] > 0).double().mean()) > 0.9


def test_theorem_1_in_a_hundred_dimensions():
    x, y = artificial_data("noisy", 100)
    with unchecked():
        run = regress(x, y, guarded=True, learning_rate=1.0, steps=200)
    assert (run.error_sums.diff() < 0).all()
    assert float(run.losses[-1]) == pytest.approx(global_loss(x, y), abs=1e-6)


def test_a_rate_that_is_too_large_is_what_the_guard_prevents():
    x, y = artificial_data("noisy", 2, rows=100)
    free = regress(x, y, learning_rate=3.0, steps=30)
    assert not (free.error_sums.diff() < 0).all()
    guarded = regress(x, y, learning_rate=3.0, steps=30, guarded=True)
    assert (guarded.error_sums.diff() < 0).all()


def test_the_curves_are_of_the_errors_that_they_say():
    x, y = artificial_data("noisy", 3, rows=40)
    run = regress(x, y, steps=3)
    p = x @ run.weight + run.bias
    best = np.linalg.lstsq(np.hstack([x.numpy(), np.ones((40, 1))]), y.numpy(), rcond=None)[0]
    away = p.numpy() - np.hstack([x.numpy(), np.ones((40, 1))]) @ best
    assert float(run.network_errors[-1]) == pytest.approx(np.sqrt((away**2).mean()))
    miss = run.synthesizer(p, y) - (p - y)
    assert float(run.sg_errors[-1]) == pytest.approx(float(miss.square().mean().sqrt()))
    assert float(run.losses[-1]) == pytest.approx(float(row_losses(p, y, "mse").mean()))


def test_mse_ends_at_one_minus_one_zero():
    x, y = artificial_data("random", 2)
    with unchecked():
        run = regress(x, y, steps=1000, start=LinearMap.zeros(1, 1))
    assert float(run.losses[-1]) == pytest.approx(global_loss(x, y), abs=1e-5)
    # along the data's own outputs, which hardly move in the end, the map is the closed form
    p = x @ run.weight + run.bias
    assert_close(run.synthesizer(p, y), squared_error_map(1)(p, y), rtol=0, atol=0.02)
    assert float(run.synthesizer.B) == pytest.approx(-1, abs=1e-3)


def test_log_loss_fails_on_separable_data_and_not_on_random_labels():
    gaps = {}
    for kind in ("separable", "random"):
        x, y = artificial_data(kind, 20, rows=100)
        with unchecked():
            synthetic, true = (
                regress(x, y, loss="log", teacher=teacher, steps=300, learning_rate=1.0)
                for teacher in ("synthetic", "true")
            )
        gaps[kind] = float(synthetic.losses[-1] - true.losses[-1])
    assert gaps["separable"] > 0.05
    assert abs(gaps["random"]) < 1e-3


def test_log_loss_on_random_labels_ends_at_the_closed_form():
    x, y = artificial_data("random", 2)
    with unchecked():
        run = regress(x, y, loss="log", steps=500, learning_rate=1.0)
    for found, expected in zip(run.synthesizer, log_loss_map(), strict=True):
        assert_close(found, expected, rtol=0, atol=0.01)


# ---- the tracking rate


def test_a_converged_synthetic_gradient_is_backprop():
    x, y = artificial_data("noisy", 5, rows=60)
    converged = regress(x, y, sg_steps="converged", steps=100)
    true = regress(x, y, teacher="true", steps=100)
    assert_close(converged.weight, true.weight, rtol=0, atol=1e-12)
    # learnt at outputs of zero, which leave A open, and from then on exact wherever the net goes
    assert float(converged.sg_errors[1]) > 1e-2
    assert float(converged.sg_errors[2:].max()) < 1e-12
    followed = regress(x, y, steps=100)
    assert float(followed.sg_errors[2:].max()) > 1e-3


def test_more_steps_of_the_estimator_track_better():
    x, y = artificial_data("noisy", 5, rows=60)
    true = regress(x, y, teacher="true", steps=20)
    away = [float((regress(x, y, sg_steps=k, steps=20).weight - true.weight).norm()) for k in (0, 1, 3, 10)]
    assert away == sorted(away, reverse=True)
    assert away[-1] < away[1] / 5


def test_a_frozen_synthetic_gradient_at_zero_teaches_nothing():
    x, y = artificial_data("noisy", 5, rows=60)
    assert not regress(x, y, sg_steps=0, steps=5).weight.any()
    frozen = regress(x, y, sg_steps=0, steps=200, learning_rate=0.5, start=squared_error_map(1))
    assert float(frozen.losses[-1]) == pytest.approx(
        global_loss(x, y), abs=1e-6
    )  # it was right to begin with


def test_a_callback_sees_every_synthetic_gradient():
    x, y = artificial_data("noisy", 2, rows=20)
    seen = []
    run = regress(x, y, steps=3, on_step=lambda step, synthesizer: seen.append((step, synthesizer)))
    assert [step for step, _ in seen] == [0, 1, 2]
    assert not seen[0][1].A.any()
    assert seen[2][1].B.any()
    assert len(run.losses) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"Expected `loss` to be one of \('mse', 'log'\), but got 'hinge'"),
        ({"teacher": "none"}, r"Expected `teacher` to be one of .*, but got 'none'"),
        ({"sg_steps": -1}, r"Expected `sg_steps` to be 'converged' or an integer .*, but got -1"),
        ({"loss": "log", "guarded": True}, r"squared error where the rate is guarded, but got loss='log'"),
    ],
)
def test_strange_options_are_refused(options, message):
    x, y = artificial_data("noisy", 2, rows=20)
    with unchecked(), pytest.raises(ValueError, match=message):
        regress(x, y, **options)


def test_the_log_loss_has_no_sum_of_errors():
    x, y = artificial_data("noisy", 2, rows=20)
    with pytest.raises(ValueError, match=r"Expected a run on the squared error, but got one on the log loss"):
        _ = regress(x, y, loss="log", steps=1).error_sums
