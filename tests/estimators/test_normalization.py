"""BatchNorm against torch's own in training mode; and what it does with a single row."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_dni.estimators.normalization import BatchNorm

FORMS = [
    pytest.param((6, 5), 1, nn.BatchNorm1d, id="vectors"),
    pytest.param((6, 5), -1, nn.BatchNorm1d, id="vectors, last"),
    pytest.param((6, 4, 5), -1, nn.BatchNorm1d, id="sequences, last"),
    pytest.param((6, 5, 4), 1, nn.BatchNorm1d, id="signals"),
    pytest.param((6, 5, 4, 3), 1, nn.BatchNorm2d, id="maps"),
    pytest.param((1, 5, 4, 3), 1, nn.BatchNorm2d, id="one map"),
    pytest.param((1, 4, 5), -1, nn.BatchNorm1d, id="one sequence"),
]


def pair(feature_dim, twin):
    ours, theirs = BatchNorm(5, feature_dim).double(), twin(5).double()
    for module in (ours, theirs):
        module.weight.data = torch.linspace(0.5, 2.0, 5).double()
        module.bias.data = torch.linspace(-1.0, 1.0, 5).double()
    return ours, theirs


def flat(x, feature_dim):
    return x.reshape(-1, 5) if feature_dim == -1 else x


@pytest.mark.parametrize(("shape", "feature_dim", "twin"), FORMS)
def test_equals_torch_in_training(shape, feature_dim, twin):
    ours, theirs = pair(feature_dim, twin)
    for _ in range(3):
        x = (3 * torch.randn(shape) + 1).double().requires_grad_()
        y = flat(x.detach(), feature_dim).clone().requires_grad_()
        upstream = torch.randn(shape).double()
        got, expected = ours(x, track=True), theirs(y)
        assert got.shape == x.shape
        assert_close(flat(got, feature_dim), expected)
        got.backward(upstream)
        expected.backward(flat(upstream, feature_dim))
        assert_close(flat(x.grad, feature_dim), y.grad)
    assert_close((ours.weight.grad, ours.bias.grad), (theirs.weight.grad, theirs.bias.grad))
    assert_close((ours.running_mean, ours.running_var), (theirs.running_mean, theirs.running_var))


@pytest.mark.parametrize(("shape", "feature_dim", "twin"), FORMS)
def test_the_averages_stay_without_track(shape, feature_dim, twin):
    ours, _ = pair(feature_dim, twin)
    x = torch.randn(shape).double()
    with torch.no_grad():
        untracked = ours(x)
    assert torch.equal(ours.running_mean, torch.zeros(5).double())
    assert torch.equal(ours.running_var, torch.ones(5).double())
    assert torch.equal(ours(x, track=True), untracked)


@pytest.mark.parametrize(
    ("shape", "feature_dim"), [((1, 5), 1), ((1, 5), -1), ((1, 1, 5), -1), ((1, 5, 1), 1)]
)
@pytest.mark.parametrize("track", [True, False])
def test_a_single_row_is_normalized_by_the_averages_and_leaves_them(shape, feature_dim, track):
    ours, theirs = pair(feature_dim, nn.BatchNorm1d)
    batch = torch.randn(8, 5).double()
    ours(batch, track=True)
    theirs(batch)
    averages = [ours.running_mean.clone(), ours.running_var.clone()]
    x = torch.randn(shape).double()
    assert_close(ours(x, track=track).flatten(), theirs.eval()(x.view(1, 5)).flatten())
    assert_close([ours.running_mean, ours.running_var], averages, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(("shape", "feature_dim", "twin"), FORMS)
def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_averages(shape, feature_dim, twin, value):
    ours, theirs = pair(feature_dim, twin)
    for spoilt in (False, True, False):
        x = torch.randn(shape).double()
        if not spoilt:
            theirs(flat(x, feature_dim))
        else:
            x.view(-1)[0] = value  # the square of 1e300 overflows
        assert ours(x, track=True).isfinite().all().item() is not (spoilt and value != 1e300)
    assert_close((ours.running_mean, ours.running_var), (theirs.running_mean, theirs.running_var))


def test_memory_format_does_not_matter():
    ours, _ = pair(1, nn.BatchNorm2d)
    x = torch.randn(6, 5, 4, 3).double()
    assert_close(ours(x.to(memory_format=torch.channels_last)), ours(x))
