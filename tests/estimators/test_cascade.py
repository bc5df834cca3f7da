"""CriticCascade against critics trained by hand, each on what the next one says."""

from functools import partial

import pytest
import torch
from core.nets import attached, blobs, mlp, run_step
from oracles import CriticsByHand, head_by_hand, scores_by_hand
from tables import CLASSES, ESTIMATORS, batch_for, each, loss_of, network, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticCascade, LinearEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("cascade")]
SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))
cascade = partial(CriticCascade, num_classes=CLASSES)


def difference(row, head, h, target, output, above, classes):
    """Absolute difference of the labels' losses, here and above; per row."""
    here, there = (
        -s.log_softmax(-1).gather(-1, classes.unsqueeze(-1))
        for s in (scores_by_hand(head, row, h), output if above is None else above)
    )
    return (here - there).abs().sum() / len(h)


@each(ROWS)
def test_equals_a_hand_written_loop(row):
    """Stages, heads and losses of five steps."""
    (model, inputs), (twin, _) = network(row, torch.float64), network(row, torch.float64)
    seeds = {"0": 1, "1": 2}
    engine = DNIEngine(
        model,
        ["0", "1"],
        lambda spec: row.stirred(seeds[spec.name], dtype=torch.float64),
        labels=1,
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    heads = [head_by_hand(row.stirred(seed, dtype=torch.float64)) for seed in seeds.values()]
    scores = lambda head, h: scores_by_hand(head, row, h)
    by_hand = CriticsByHand(twin, heads, scores, loss_of, partial(difference, row))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine:
        for seed in range(5):
            x, context, classes = batch_for(row, inputs, seed=seed, dtype=torch.float64)
            optimizer.zero_grad()
            with engine.training_step((x, context)):
                loss = loss_of(model(x), classes)
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
            assert_close(loss.detach(), by_hand.step(x, classes), rtol=0, atol=1e-10)
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=1e-10)
    for name, head in zip("01", heads, strict=True):
        trained = head_by_hand(engine.estimators[name])
        assert_close(dict(trained.state_dict()), dict(head.state_dict()), rtol=0, atol=1e-10)


def test_only_the_topmost_hears_of_the_network_above():
    """Within a step the lower critic learns from the upper one alone: no bit differs with the top."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model, batch = mlp(), blobs()
        engine = attached(model, ["0", "1"], cascade)
        run_step(engine, model, batch)
        own = torch.Generator().manual_seed(3)
        for estimator in engine.estimators.values():
            nn.init.normal_(estimator.head.stack.layers[0].weight, generator=own)
            estimator.zero_grad()
        nn.init.normal_(model[2].weight, generator=torch.Generator().manual_seed(seed))
        run_step(engine, model, batch)
        found.append([engine.estimators[name].head.stack.layers[0].weight.grad for name in "01"])
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].any()
    assert not torch.equal(found[0][1], found[1][1])


def test_is_done_where_it_predicts_the_loss():
    estimator = cascade(SPEC)
    (layer,) = estimator.head.stack.layers
    nn.init.normal_(layer.weight)
    h, y = torch.randn(6, 5), torch.arange(6) % CLASSES
    record = record_of(estimator, (h,), y)
    loss = estimator.loss(record, Feedback(output=layer(h).detach()))
    assert_close(loss.detach(), torch.zeros(()))
    off = layer(h).detach() + 2.0 * F.one_hot(y, CLASSES)
    assert estimator.loss(record, Feedback(output=off)) > 0.1


def test_refuses_another_kind_above():
    model = mlp()
    factories = {"0": cascade, "1": partial(LinearEstimator, num_classes=CLASSES)}
    engine = attached(model, ["0", "1"], factories)
    with pytest.raises(
        EstimatorError,
        match=r"the estimator above CriticCascade at boundary '0' to predict .*, but it predicts nothing",
    ):
        run_step(engine, model, blobs())


def test_refuses_an_output_that_is_no_score_per_class():
    estimator = cascade(SPEC)
    record = record_of(estimator, (torch.randn(6, 5),), torch.zeros(6, dtype=torch.long))
    with pytest.raises(EstimatorError, match=r"CriticCascade at boundary .*\(6, 3\), but got \(6, 4\)"):
        estimator.loss(record, Feedback(output=torch.randn(6, 4)))


def test_refuses_a_network_whose_output_was_never_seen():
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0", "1"], cascade, output="2")
    with engine.training_step((x, y)):
        scores = F.linear(model[1](model[0](x)), model[2].weight)
        loss = F.cross_entropy(scores, y)
    with pytest.raises(EstimatorError, match=r"output for CriticCascade at boundary '1', but .* `output=`"):
        engine.backward(loss)
