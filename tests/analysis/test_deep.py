"""Corollary 1 on a reduced size: deep linear nets do as backprop, save on separable data with log loss."""

import pytest
import torch
from core.nets import unchecked

from lightning_dni.analysis import artificial_data, deep_linear, regress, train_deep_linear

REDUCED = {"hidden_layers": 2, "steps": 200, "learning_rate": 5e-2, "sg_learning_rate": 0.2}


def both(kind, loss, features=2):
    x, y = artificial_data(kind, features, rows=100)
    with unchecked():
        return [train_deep_linear(x, y, loss=loss, teacher=t, **REDUCED) for t in ("synthetic", "true")]


@pytest.mark.parametrize(("kind", "loss"), [("separable", "mse"), ("random", "log")])
def test_a_deep_linear_net_reaches_the_global_solution_as_backprop_does(kind, loss):
    synthetic, true = both(kind, loss)
    assert float(synthetic.losses[-1]) == pytest.approx(float(true.losses[-1]), abs=1e-4)
    assert synthetic.sg_error < 0.05
    assert synthetic.stationarity.joint < 1e-3  # a critical point, of the original problem, too
    assert synthetic.stationarity.original < 1e-3
    assert true.stationarity.estimator == 0
    x, y = artificial_data(kind, 2, rows=100)
    with unchecked():
        best = regress(x, y, loss=loss, teacher="true", steps=600, learning_rate=0.5)
    assert float(synthetic.losses[-1]) == pytest.approx(float(best.losses[-1]), abs=1e-4)


def test_separable_data_with_log_loss_are_left_behind():
    synthetic, true = both("separable", "log")
    assert float(synthetic.losses[-1]) > 1.5 * float(true.losses[-1])
    assert synthetic.sg_error > 0.8


def test_with_log_loss_the_pair_rests_where_backprop_would_go_on():
    synthetic, _ = both("separable", "log", features=25)
    assert synthetic.stationarity.joint < 1e-3
    assert synthetic.stationarity.original > 0.1


def test_noisy_labels_with_log_loss_are_left_behind_in_many_dimensions():
    synthetic, true = both("noisy", "log", features=25)
    assert float(synthetic.losses[-1]) > float(true.losses[-1]) + 0.02
    synthetic, true = both("noisy", "log")
    assert float(synthetic.losses[-1]) == pytest.approx(float(true.losses[-1]), abs=1e-4)
    synthetic, true = both("noisy", "mse", features=25)
    assert float(synthetic.losses[-1]) == pytest.approx(float(true.losses[-1]), abs=1e-4)


def test_lambda_one_is_plain_backprop_in_torch():
    x, y = artificial_data("noisy", 3, rows=20)
    run = train_deep_linear(x, y, teacher="true", **{**REDUCED, "steps": 10})
    model = deep_linear(3, hidden_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 5e-2 * (1 - step / 10)
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum(1).mean() / 2
        assert float(run.losses[step]) == pytest.approx(float(loss), rel=1e-12)
        loss.backward()
        optimizer.step()
    assert run.synthesizer is None
    assert run.sg_error is None


def test_weights_are_orthogonal_and_of_their_seed():
    before = torch.get_rng_state()
    model = deep_linear(5, hidden_layers=4, width=3)
    assert [layer.weight.shape for layer in model] == [(3, 5), (3, 3), (3, 3), (3, 3), (1, 3)]
    for layer in model:
        weight = layer.weight.detach()
        torch.testing.assert_close(weight @ weight.t(), torch.eye(len(weight), dtype=weight.dtype))
        assert not layer.bias.any()
    assert torch.equal(model[0].weight, deep_linear(5, hidden_layers=4, width=3)[0].weight)
    assert not torch.equal(model[0].weight, deep_linear(5, hidden_layers=4, width=3, seed=1)[0].weight)
    assert torch.equal(before, torch.get_rng_state())
