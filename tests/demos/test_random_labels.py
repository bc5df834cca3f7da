"""The labels are random, the points are the same for every split, and the global generator is left alone."""

import pytest
import torch

from lightning_dni.analysis import fit_probe
from lightning_dni.demos import RandomLabelsDataModule


def rows_of(**options):
    data = RandomLabelsDataModule(**options)
    data.setup()
    return data.splits


def test_points_and_labels_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = rows_of(), rows_of(), rows_of(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert torch.equal(one.train.targets, same.train.targets)
    assert not torch.equal(one.train.inputs, other.train.inputs)
    assert not torch.equal(one.train.targets, other.train.targets)


def test_what_validates_is_what_trains():
    splits = rows_of(num_points=30, num_features=4, num_classes=3)
    assert splits.train is splits.val is splits.test
    assert (splits.train.inputs.shape, len(splits.train)) == ((30, 4), 30)
    assert set(splits.train.targets.tolist()) == {0, 1, 2}


def test_labels_cannot_be_predicted():
    train = rows_of(num_points=4000, num_features=5).train
    probe = fit_probe(train.inputs[:2000], train.targets[:2000])
    assert abs(probe.accuracy(train.inputs[2000:], train.targets[2000:]) - 0.5) < 0.04  # 3.6 standard errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_points": 0}, "`num_points` to be an integer of at least 1, but got 0"),
        ({"num_features": 0}, "`num_features` to be an integer of at least 1, but got 0"),
        ({"num_classes": 1}, "`num_classes` to be an integer of at least 2, but got 1"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
    ],
)
def test_argument_out_of_range_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        RandomLabelsDataModule(**options)
