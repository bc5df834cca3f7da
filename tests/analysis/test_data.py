"""The four kinds of artificial data."""

import pytest
import torch
from core.nets import unchecked

from lightning_dni.analysis import artificial_data, one_hot


@pytest.mark.parametrize("features", [2, 100])
def test_kinds_have_the_labels_that_they_say(features):
    x, side = artificial_data("separable", features)
    assert x.shape == (400, features)
    weight = torch.linalg.lstsq(x, 2 * side - 1).solution
    for _ in range(2000):  # a perceptron stops where the data are separable
        wrong = ((x @ weight > 0).double() != side).squeeze(1)
        if not wrong.any():
            break
        weight = weight + x[wrong].t() @ (2 * side[wrong] - 1)
    assert not wrong.any()
    noisy, random = artificial_data("noisy", features).y, artificial_data("random", features).y
    assert 0.02 < (noisy != side).double().mean() < 0.09  # a tenth drawn again: half of them as before
    assert 0.4 < (random != side).double().mean() < 0.6
    xor = artificial_data("xor", features)
    assert torch.equal(xor.y.squeeze(1) == 1, (xor.x[:, 0] > 0) != (xor.x[:, 1] > 0))


def test_data_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (artificial_data("noisy", 2, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.x, other.x)
    assert torch.equal(before, torch.get_rng_state())


def test_one_hot_labels():
    assert one_hot(torch.tensor([[0.0], [1.0]])).tolist() == [[1, 0], [0, 1]]


def test_strange_data_are_refused():
    with unchecked(), pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'moons'"):
        artificial_data("moons", 2)
    with pytest.raises(
        ValueError, match=r"`features` of at least 2 and `rows` of at least 1, but got 1 and 400"
    ):
        artificial_data("xor", 1)
