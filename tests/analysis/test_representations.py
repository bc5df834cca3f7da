"""Dissimilarities, block distances and norms against numpy; collecting outputs leaves no trace."""

import numpy as np
import pytest
import torch
from fits import attributes, hooks_on
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.analysis import (
    class_block_distances,
    dissimilarity,
    layer_outputs,
    order_by_class,
    weight_norm_profile,
    weight_norm_slope,
)
from lightning_dni.errors import StageError


class Net(nn.Module):
    """Draws, counts, and works in place, as a network may."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = torch.rand(())
        return self.head(F.dropout(self.body(x), 0.5))


def data(samples=20, features=7, classes=3):
    return torch.randn(samples, features), torch.arange(samples) % classes


# ---- dissimilarity


def test_dissimilarity_is_one_minus_numpys_correlation():
    rows, _ = data()
    expected = torch.from_numpy(1 - np.corrcoef(rows.double().numpy()))
    assert_close(dissimilarity(rows), expected, rtol=0, atol=1e-12)


def test_dissimilarity_does_not_see_offset_and_scale_of_a_row():
    rows, _ = data()
    scales = torch.linspace(0.1, 10, 20, dtype=torch.float64).unsqueeze(1)
    moved = rows.double() * scales + torch.arange(20).double().unsqueeze(1)
    assert_close(dissimilarity(moved), dissimilarity(rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_a_row_of_equal_features_is_at_one_from_every_other(constant):
    rows, _ = data(4)
    rows[1] = constant
    found = dissimilarity(rows)
    assert found[1].tolist() == [1, 0, 1, 1]
    assert found[:, 1].tolist() == [1, 0, 1, 1]


def test_a_row_that_is_no_number_stays_one():
    rows, _ = data(3)
    rows[0, 0] = torch.nan
    assert dissimilarity(rows).isnan().tolist() == [
        [False, True, True],
        [True, False, False],
        [True, False, False],
    ]


# ---- distance of blocks


def test_block_distance_is_that_of_the_pairs_within_classes():
    _, labels = data(6, classes=2)
    one, last = (torch.from_numpy(np.random.default_rng(k).random((6, 6))) for k in (0, 1))
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j and i % 2 == j % 2]
    expected = np.sqrt(np.mean([(one[i, j] - last[i, j]).item() ** 2 for i, j in pairs]))
    found = class_block_distances([one, last], labels)
    assert found.tolist() == pytest.approx([expected, 0.0])


def test_pairs_of_two_classes_do_not_count():
    _, labels = data(6, classes=2)
    across = (labels.unsqueeze(0) != labels.unsqueeze(1)).double()
    assert class_block_distances([across, torch.zeros(6, 6).double()], labels).tolist() == [0, 0]


def test_order_of_samples_does_not_matter():
    rows, labels = data()
    order = order_by_class(labels)
    as_they_came = [dissimilarity(rows), dissimilarity(rows.square())]
    ordered = [dissimilarity(rows[order]), dissimilarity(rows[order].square())]
    assert labels[order].tolist() == sorted(labels.tolist())
    found = class_block_distances(ordered, labels[order])
    assert_close(found, class_block_distances(as_they_came, labels), rtol=1e-12, atol=0)


def test_distance_to_nothing_is_refused():
    with pytest.raises(ValueError, match="Expected `matrices` to hold one matrix per layer, but got none"):
        class_block_distances([], torch.arange(2))
    with pytest.raises(
        ValueError, match="Expected `labels` to have two samples of one class, but got 2 samples"
    ):
        class_block_distances([torch.eye(2)], torch.arange(2))


# ---- norms


def test_norms_are_squares_over_their_sum():
    layers = {"a": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "none": nn.ReLU(), "b": nn.Linear(2, 4)}
    with torch.no_grad():
        layers["a"][0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layers["a"][0].bias.fill_(100)
        layers["a"][1].weight.fill_(100)
        layers["b"].weight.fill_(2)
    assert weight_norm_profile(layers) == pytest.approx({"a": 30 / 62, "b": 32 / 62})


def filled(size, value):
    layer = nn.Linear(size, 2, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_slope_of_norms_is_least_squares_over_layers_of_the_usual_size():
    layers = {"first": filled(7, 9.0), "a": filled(2, 1.0), "relu": nn.ReLU(), "b": filled(2, 3.0)}
    layers["c"] = filled(2, 2.0)
    shares = weight_norm_profile(layers)
    slope, _ = np.polyfit([0, 1, 2], [shares[name] for name in "abc"], 1)
    assert weight_norm_slope(layers) == pytest.approx(slope)
    assert weight_norm_slope(dict(reversed(layers.items()))) == pytest.approx(-slope)
    assert weight_norm_slope({"a": filled(2, 1.0), "relu": nn.ReLU()}) is None
    assert weight_norm_slope({}) is None


def test_norms_of_zero_weights_are_zero():
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    assert weight_norm_profile({"a": layer}) == {"a": 0.0}
    assert weight_norm_profile({"a": nn.ReLU()}) == {}


# ---- outputs


def test_outputs_are_those_of_each_layer_in_evaluation_mode():
    net = Net()
    net.body.append(nn.Identity())
    inputs = torch.randn(10, 6)
    found = layer_outputs(net, {"linear": net.body[0], "relu": net.body[2]}, inputs, batch_size=4)
    linear = net.body[0](inputs)
    expected = net.body[1].eval()(linear).relu()
    assert_close(
        found["linear"], linear.detach(), rtol=1e-6, atol=1e-7
    )  # the inplace ReLU has not reached it
    assert_close(found["relu"], expected.detach(), rtol=1e-6, atol=1e-7)
    assert not found["relu"].requires_grad


def test_outputs_of_any_shape_become_rows():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))
    net.append(nn.Unflatten(0, (-1, 2))).append(nn.Linear(2, 1)).append(nn.Flatten(0))
    layers = {"conv": net[0], "last": net[5]}
    found = layer_outputs(net, layers, torch.randn(5, 1, 4, 4))
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"conv": (5, 8), "last": (5, 1)}


def test_collecting_outputs_leaves_the_model_and_the_generator_alone():
    net = Net()
    net(torch.randn(9, 6))
    net.body.eval()
    net.body[3].train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    objects = dict(net.named_buffers())
    flags = {name: m.training for name, m in net.named_modules()}
    generator, names = torch.get_rng_state(), attributes(net)
    layer_outputs(net, {"head": net.head}, torch.randn(9, 6, generator=torch.Generator()), batch_size=2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: m.training for name, m in net.named_modules()} == flags
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(buffer is objects[name] for name, buffer in net.named_buffers())
    assert (hooks_on(net), attributes(net)) == (0, names)


def test_a_failing_forward_leaves_the_model_alone_too():
    net = Net()
    with pytest.raises(RuntimeError, match="shapes"):
        layer_outputs(net, {"head": net.head}, torch.randn(9, 5))
    assert net.training
    assert net.calls == 0
    assert hooks_on(net) == 0


def test_a_layer_that_does_not_run_is_refused():
    net = Net()
    net.unused = nn.Linear(1, 1)
    with pytest.raises(
        StageError, match="Expected layer 'unused' to run when the model does, but it did not"
    ):
        layer_outputs(net, {"unused": net.unused}, torch.randn(2, 6))


def test_a_layer_without_a_row_per_sample_is_refused():
    net = nn.Sequential(nn.Flatten(0), nn.Linear(12, 2))
    match = (
        r"Expected layer 'flat' to give a tensor with one row for each of 2 samples, but got shape \(12,\)"
    )
    with pytest.raises(StageError, match=match):
        layer_outputs(net, {"flat": net[0]}, torch.randn(2, 6))
    lstm = nn.LSTM(3, 2, batch_first=True)
    with pytest.raises(StageError, match="one row for each of 2 samples, but got tuple"):
        layer_outputs(lstm, {"lstm": lstm}, torch.randn(2, 4, 3))
