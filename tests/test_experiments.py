"""What studies call, against the instruments it is made of, on reduced sizes."""

import pytest
import torch
from core.nets import unchecked
from torch.nn import functional as F

from lightning_dni.analysis import LinearMap, artificial_data, regress, train_deep_linear
from lightning_dni.core import DNIEngine
from lightning_dni.core.randomness import seeded
from lightning_dni.demos import DigitsDataModule, MLPClassifier
from lightning_dni.experiments import (
    counter_example,
    deep_linear_dynamics,
    implicit_losses,
    linear_dynamics,
    stale_stages,
)


def test_the_counter_example_ends_at_six_and_shows_the_ways_of_all_modules():
    figures = counter_example([1.0, 3.0, 0.0], "constant", steps=100)
    assert len(figures["loss"]) == 101
    assert float(figures["loss"][-1]) == pytest.approx(6.0)
    assert figures["slope"] == pytest.approx(1.0)
    assert abs(figures["offset"]) < 1
    legend = [text.get_text() for text in figures["surface"].legends[0].get_texts()]
    assert legend[0] == "constant SG: ends at 6"
    assert legend[1].startswith("SG c sign(f): ends at 0.2")
    assert legend[2].startswith("backprop: ends at 0.2")
    residuals = {name: value for name, value in figures.items() if name.startswith("residual")}
    assert residuals == {
        "residual_above": 0.0,
        "residual_below": pytest.approx(0, abs=0.05),
        "residual_sg": pytest.approx(0, abs=0.05),
        "residual_below_true": pytest.approx(1.5),  # backprop would go on
    }
    backprop = counter_example([1.0, 3.0, 0.0], "none", steps=100)
    assert float(backprop["loss"][-1]) == pytest.approx(float(legend[2].split()[-1]), rel=0.05)


def test_linear_dynamics_are_those_of_both_regressions():
    x, y = artificial_data("noisy", 3, 30, seed=1)
    options = {"loss": "log", "steps": 20, "learning_rate": 0.3}
    given, true = (regress(x, y, teacher=teacher, **options) for teacher in ("synthetic", "true"))
    figures = linear_dynamics("noisy", 3, rows=30, seed=1, **options)
    assert figures["loss_backprop"] == float(true.losses[-1])
    assert figures["loss_sg"] == float(given.losses[-1])
    assert figures["gap"] == float(given.losses[-1] - true.losses[-1]) > 0
    assert figures["sg_error"] == float(given.sg_errors[-1])
    assert [figures[f"sg_{name}"] for name in "abc"] == [each.item() for each in given.synthesizer]


@pytest.mark.parametrize("kind", ["separable", "noisy"])
def test_with_squared_error_joint_training_ends_at_the_closed_form(kind):
    """Claim 1: A, B, C are 1, -1, 0."""
    figures = linear_dynamics(kind, 20, "mse", rows=100, steps=400, learning_rate=0.3)
    assert [figures[f"sg_{name}"] for name in "abc"] == pytest.approx([1, -1, 0], abs=1e-4)
    assert abs(figures["gap"]) < 1e-5


def test_deep_linear_dynamics_are_those_of_both_trainings():
    x, y = artificial_data("xor", 2, 20, seed=1)
    options = {"loss": "mse", "steps": 5, "hidden_layers": 4, "seed": 1}
    rates = {"learning_rate": 1e-2, "sg_learning_rate": 5e-2}
    given, true = (train_deep_linear(x, y, teacher=t, **options, **rates) for t in ("synthetic", "true"))
    figures = deep_linear_dynamics("xor", 2, rows=20, **options, **rates)
    assert figures["loss_backprop"] == float(true.losses[-1])
    assert figures["gap"] == float(given.losses[-1]) - float(true.losses[-1]) != 0
    assert figures["sg_error"] == given.sg_error
    assert figures["residual_joint"] == float(given.stationarity.joint)
    assert figures["residual_original"] == float(given.stationarity.original)
    assert figures["residual_backprop"] == float(true.stationarity.original)


def test_the_implicit_loss_is_the_squared_error_at_the_top_and_less_below():
    with unchecked():
        figures = implicit_losses(
            "noisy", "mse", "everywhere", steps=120, comparisons=2, hidden_layers=3, drawn=[2]
        )
    assert {len(figures[f"correlation_{k}"]) for k in (1, 2, 3)} == {2}
    assert figures["step"] == [60, 120]
    assert figures["correlation_3"][-1] > 0.95
    assert figures["correlation_1"][-1] < figures["correlation_3"][-1]
    assert figures["train_loss"][1] < figures["train_loss"][0]
    titles = [axes.get_title().split("\n")[0] for axes in figures["losses"].axes]
    assert len(titles) == 2 * 4  # two labels; true loss and three boundaries
    assert titles[:4] == ["true loss", "layer_1", "layer_2", "layer_3"]
    assert {axes.get_ylabel().split("\n")[0] for axes in figures["losses"].axes[::4]} == {
        "step 120, label 0",
        "step 120, label 1",
    }


def test_curl_and_smallest_eigenvalue_are_those_of_the_estimators(monkeypatch):
    """Of A's symmetric part, by hand, at the last comparison."""
    engines = []

    class Kept(DNIEngine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            engines.append(self)

    monkeypatch.setattr("lightning_dni.experiments.DNIEngine", Kept)
    with unchecked():
        figures = implicit_losses("separable", "mse", "everywhere", steps=40, comparisons=2, rows=20, side=2)
    for k in range(1, 7):
        a = LinearMap.of(engines[0].estimators[f"layer_{k}"]).A.double()
        assert len(figures[f"curl_{k}"]) == 2
        assert figures[f"curl_{k}"][-1] == pytest.approx(float((a - a.T).norm() / a.norm()))
        smallest = float(torch.linalg.eigvalsh((a + a.T) / 2)[0])
        assert figures[f"smallest_eigenvalue_{k}"][-1] == pytest.approx(smallest)


def test_one_synthetic_gradient_is_below_the_output_and_the_seed_is_all_that_counts():
    options = {"steps": 2, "comparisons": 1, "rows": 10, "side": 2}
    before = torch.get_rng_state()
    with unchecked():
        one, same, other = (implicit_losses("random", "log", seed=seed, **options) for seed in (0, 0, 1))
    assert {name for name in one if name.startswith("correlation")} == {"correlation_6"}
    assert "losses" not in one
    assert one["train_loss"] == same["train_loss"] != other["train_loss"]
    assert torch.equal(before, torch.get_rng_state())


def test_stale_stages_without_a_lag_are_backprop_and_with_one_are_not():
    data = DigitsDataModule().load()
    figures = {lag: stale_stages("delayed", 2, lag, steps=6, hidden_layers=2, width=8) for lag in (0, 2)}
    with seeded(0, torch.device("cpu")):
        net = MLPClassifier(hidden_size=8, num_hidden=2).net
        order = [torch.randperm(len(data.train.rows))[:64] for _ in range(6)]
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for index in order:
        rows = data.train.rows[index]
        loss = F.cross_entropy(net(data.train.inputs[rows].flatten(1)), data.train.targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    scores = net.eval()(data.test.inputs[data.test.rows].flatten(1))
    wrong = (scores.argmax(1) != data.test.targets[data.test.rows]).double().mean()
    assert figures[0] == {"test_error": 100 * float(wrong), "train_loss": sum(losses) / 6}
    assert figures[2]["train_loss"] != figures[0]["train_loss"]


@pytest.mark.parametrize("method", ["cDNI", "critic"])
def test_stale_stages_learn(method):
    figures = stale_stages(method, 2, 1, steps=60, hidden_layers=2, width=32, sg_learning_rate=1e-2)
    assert figures["test_error"] < 20
