"""The similarity loss of LocalLossEstimator against cosines of pairs, one by one."""

import math

import pytest
import torch
from oracles import head_by_hand, scores_by_hand
from tables import CLASSES, ESTIMATORS, batch_for, each, exact, lesson, loss_of, network, record_of
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LocalLossEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("similarity")]
SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))
WEIGHT = 0.7


def cosine(a, b):
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def similarity_loss(layer, h, y):
    """Mean over all pairs, the labels' similarities from their one-hot vectors."""
    features = layer(h)
    if h.ndim == 3:
        features = features.sum(1) / h.shape[1]
    if h.ndim == 4:
        flat = features.flatten(2)
        spread = (flat - flat.mean(2, keepdim=True)).square().sum(2) / (flat.shape[2] - 1)
        features = spread.sqrt()
    one_hot = torch.eye(CLASSES, dtype=h.dtype)[y]
    pairs = [
        (cosine(features[i], features[j]) - cosine(one_hot[i], one_hot[j])).square()
        for i in range(len(h))
        for j in range(len(h))
    ]
    return torch.stack(pairs).mean()


@each(ROWS)
def test_equals_a_hand_written_loop(row):
    """Stages, heads and maps of three steps; the user's loss is a mean, so the stage's gradient too."""
    (model, inputs), (twin, _) = network(row, torch.float64), network(row, torch.float64)
    make = lambda spec=None: row.stirred(dtype=torch.float64)
    engine = DNIEngine(
        model, ["0", "1"], make, labels=1, estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    heads, maps = [head_by_hand(make()) for _ in range(2)], [make().matching.map for _ in range(2)]
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD([p for m in (twin, *heads, *maps) for p in m.parameters()], lr=0.1)
    with engine:
        for seed in range(3):
            x, y, classes = batch_for(row, inputs, seed=seed, dtype=torch.float64)
            ours.zero_grad()
            with engine.training_step((x, y)):
                loss = loss_of(model(x), classes)
            engine.backward(loss)
            ours.step()
            engine.update_estimators()

            theirs.zero_grad()
            h = x
            for stage, head, layer in zip(twin[:2], heads, maps, strict=True):
                h = stage(h.detach())
                prediction = loss_of(scores_by_hand(head, row, h), y)
                ((1 - WEIGHT) * prediction + WEIGHT * similarity_loss(layer, h, y)).backward()
            loss_of(twin[2](h.detach()), classes).backward()
            theirs.step()
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=1e-10)
    for name, head, layer in zip("01", heads, maps, strict=True):
        trained = engine.estimators[name]
        assert_close(dict(head_by_hand(trained).state_dict()), dict(head.state_dict()), rtol=0, atol=1e-10)
        assert_close(trained.matching.map.weight, layer.weight, rtol=0, atol=1e-10)


def test_without_it_no_bit_differs():
    """The default: the same weights, the same gradients, no map."""
    h, y, feedback = ROWS[0].sample()
    found = []
    for options in ({}, {"similarity": 0.0}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            estimator = LocalLossEstimator(SPEC, CLASSES, (4,), **options)
        assert [n.split(".")[0] for n in estimator.state_dict()] == ["head"] * 4
        record = record_of(estimator, h, y)
        assert torch.equal(record.gradient[0], estimator.head.gradient(h[0], y)[0])
        found.append(lesson(estimator, h, y, feedback))
    exact(found[0], found[1])


def test_alone_it_makes_rows_of_a_class_alike():
    """Activations that follow it end with nearly the similarities of the labels."""
    torch.manual_seed(0)
    h, y = torch.randn(12, 5).double(), torch.arange(12) % CLASSES
    estimator = LocalLossEstimator(SPEC, CLASSES, similarity=1.0).double()
    losses = []
    for _ in range(300):
        record = record_of(estimator, (h,), y)
        losses.append(estimator.loss(record, Feedback()).item())
        h = h - 0.3 * record.gradient[0].detach()
    assert losses[-1] < 1e-3 < 0.1 < losses[0]


def test_starts_with_a_gradient():
    h, y, _ = ROWS[0].sample()
    (gradient,) = record_of(ROWS[0].build(), h, y).gradient
    assert gradient.any()


def test_rows_that_are_flat_give_no_gradient_that_is_not_finite():
    """Units that are dead for a whole row, or maps without a spread."""
    for row in ROWS:
        h, y, feedback = row.sample()
        h[0][0] = 0.0
        loss, gradients = lesson(row.stirred(), h, y, feedback)
        found = [loss, *gradients.values(), *record_of(row.stirred(), h, y).gradient]
        assert all(t.isfinite().all() for t in found)


def test_refuses_labels_per_position():
    spec = BoundarySpec("net.1", (LeafSpec((4, 5), torch.float32),))
    estimator = LocalLossEstimator(spec, CLASSES, similarity=0.5)
    with pytest.raises(EstimatorError, match=r"at boundary 'net.1', of shape \(6,\), but got \(6, 4\)"):
        estimator.synthesize((torch.randn(6, 4, 5),), torch.zeros(6, 4, dtype=torch.long), None)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_refuses_a_weight_out_of_range(weight):
    with pytest.raises(EstimatorError, match="`similarity` to be from 0 to 1, but got"):
        LocalLossEstimator(SPEC, CLASSES, similarity=weight)


def test_single_maps_have_no_spread():
    """A map of one cell is its own feature vector."""
    spec = BoundarySpec("net.1", (LeafSpec((5, 1, 1), torch.float64),))
    estimator = LocalLossEstimator(spec, CLASSES, similarity=1.0).double()
    nn.init.dirac_(estimator.matching.map.weight)
    h, y = torch.randn(6, 5, 1, 1).double(), torch.arange(6) % CLASSES
    flat = nn.Identity()
    assert_close(
        estimator.matching(h, y).detach(), similarity_loss(flat, h.flatten(1), y), rtol=0, atol=1e-10
    )
