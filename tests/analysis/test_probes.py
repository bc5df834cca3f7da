"""A linear probe is scikit-learn's logistic regression on standardized features."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.analysis import fit_probe
from lightning_dni.demos import DigitsDataModule


def blobs(samples=90, features=4, classes=3, spread=2.0):
    labels = torch.arange(samples) % classes
    return torch.randn(classes, features)[labels] * 2 + spread * torch.randn(samples, features) + 5, labels


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_scores_are_scikit_learns(penalty):
    rows, labels = blobs()
    probe = fit_probe(rows, labels, penalty=penalty)
    scaler = StandardScaler().fit(rows.double().numpy())
    oracle = LogisticRegression(C=1 / (len(rows) * penalty), solver="newton-cg", tol=1e-10, max_iter=1000)
    oracle.fit(scaler.transform(rows.double().numpy()), labels.numpy())
    expected = torch.from_numpy(oracle.decision_function(scaler.transform(rows.double().numpy())))
    scores = probe.logits(rows)
    # adding a number to all classes of a row changes nothing: the penalty does not reach the biases
    assert_close(scores - scores.mean(1, True), expected - expected.mean(1, True), rtol=1e-4, atol=1e-4)
    share = oracle.score(scaler.transform(rows.double().numpy()), labels.numpy())
    assert probe.accuracy(rows, labels) == pytest.approx(share)
    assert 0.5 < share < 1


def test_fit_is_where_the_derivative_vanishes_on_real_data():
    data = DigitsDataModule()
    data.setup()
    rows = data.splits.train.inputs[:400].flatten(1)
    labels = data.splits.train.targets[:400]
    probe = fit_probe(rows, labels, penalty=1e-3)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    x = (rows.double() - probe.mean) / probe.scale
    loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5e-3 * weight.square().sum()
    slopes = torch.autograd.grad(loss, (weight, bias))
    assert max(slope.abs().max().item() for slope in slopes) < 2e-6
    assert probe.accuracy(rows, labels) == 1.0
    assert probe.weight[:, 0].tolist() == [0.0] * 10  # a corner pixel that is never set


def test_random_labels_are_not_told_apart_on_other_samples():
    rows, labels = torch.randn(400, 5), torch.randint(0, 4, (400,))
    probe = fit_probe(rows[:200], labels[:200])
    assert probe.accuracy(rows[200:], labels[200:]) < 0.4


def test_classes_that_are_not_there_may_be_counted():
    rows, labels = blobs()
    probe = fit_probe(rows, labels, num_classes=5)
    assert probe.logits(rows).shape == (90, 5)
    assert probe.logits(rows).argmax(1).max() < 3


def test_fit_draws_no_random_number():
    rows, labels = blobs()
    before = torch.get_rng_state()
    one, other = fit_probe(rows, labels), fit_probe(rows, labels)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("rows", "labels", "options", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(2).long(), {}, "Expected `labels` to be one for each of 3 rows"),
        (torch.zeros(0, 2), torch.zeros(0).long(), {}, "each of 0 rows, at least one, but got 0"),
        (torch.full((2, 2), torch.nan), torch.arange(2), {}, "Expected `rows` to be finite"),
        (
            torch.zeros(2, 2),
            torch.arange(2),
            {"penalty": 0.0},
            r"Expected `penalty` to be above 0, but got 0\.0",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(rows, labels, options, match):
    with pytest.raises(ValueError, match=match):
        fit_probe(rows, labels, **options)
