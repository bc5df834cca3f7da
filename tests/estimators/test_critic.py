"""CriticEstimator against a model of the network trained by hand on the network's own answers."""

import pytest
import torch
from oracles import head_by_hand, scores_by_hand
from tables import CLASSES, ESTIMATORS, batch_for, each, loss_of, network, record_of
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("critic")]
SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))


def followed(row, output, classes):
    share = 0.4 if "share" in row.id else 0.0
    return (1 - share) * output.softmax(-1) + share * torch.eye(CLASSES, dtype=output.dtype)[classes]


@each(ROWS)
def test_equals_a_hand_written_loop(row):
    """The stage follows the labels through the head; the head follows softmax(network output)."""
    model, inputs = network(row, torch.float64)
    twin, _ = network(row, torch.float64)
    engine = DNIEngine(
        model,
        ["0", "1"],
        lambda spec: row.stirred(dtype=torch.float64),
        labels=1,
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    heads = [head_by_hand(row.stirred(dtype=torch.float64)) for _ in range(2)]
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD([p for m in (twin, *heads) for p in m.parameters()], lr=0.1)
    with engine:
        for seed in range(5):
            x, context, classes = batch_for(row, inputs, seed=seed, dtype=torch.float64)
            ours.zero_grad()
            with engine.training_step((x, context)):
                loss = loss_of(model(x), classes)
            engine.backward(loss)
            ours.step()
            engine.update_estimators()

            h, hs = x, []
            theirs.zero_grad()
            for stage, head in zip(twin[:2], heads, strict=True):
                h = stage(h.detach())
                hs.append(h.detach())
                loss_of(scores_by_hand(head, row, h), classes).backward()
            output = twin[2](h.detach())
            for head, below in zip(heads, hs, strict=True):
                head.zero_grad()  # what the labels said was for the stage
                log_probabilities = scores_by_hand(head, row, below).log_softmax(-1)
                (-(followed(row, output.detach(), classes) * log_probabilities).sum() / len(x)).backward()
            loss_of(output, classes).backward()
            theirs.step()
            assert_close(loss.detach(), loss_of(output, classes).detach())
    assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    for name, head in zip("01", heads, strict=True):
        trained = head_by_hand(engine.estimators[name])
        assert_close(dict(trained.state_dict()), dict(head.state_dict()))


def test_labels_do_not_reach_the_head():
    """They choose the stage's gradient; what the head learns is the network's answer alone."""
    estimator = CriticEstimator(SPEC, 3)
    nn.init.normal_(estimator.head.stack.layers[0].weight)
    h, output = torch.randn(6, 5), torch.randn(6, 3)
    losses, gradients = [], []
    for y in (torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long)):
        record = record_of(estimator, (h,), y)
        losses.append(estimator.loss(record, Feedback(output=output)))
        gradients.append(record.gradient[0])
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(gradients[0], gradients[1])


def test_is_done_where_it_answers_as_the_network_does():
    """At the network's own scores the loss has no derivative: the head is a model of the network."""
    estimator = CriticEstimator(SPEC, 3)
    (layer,) = estimator.head.stack.layers
    nn.init.normal_(layer.weight)
    h = torch.randn(6, 5)
    record = record_of(estimator, (h,), torch.zeros(6, dtype=torch.long))
    estimator.loss(record, Feedback(output=layer(h).detach())).backward()
    assert_close(layer.weight.grad, torch.zeros_like(layer.weight), rtol=0, atol=1e-6)


def test_refuses_a_share_out_of_range():
    with pytest.raises(EstimatorError, match=r"`label_share` to be from 0 to 1, but got 1\.5"):
        CriticEstimator(SPEC, 3, label_share=1.5)


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3), (6, 1)], ids=str)
def test_refuses_an_output_that_is_no_score_per_class(shape):
    estimator = CriticEstimator(SPEC, 3)
    record = record_of(estimator, (torch.randn(6, 5),), torch.zeros(6, dtype=torch.long))
    with pytest.raises(
        EstimatorError, match=r"class scores of shape \(6, 3\), but got \(6, .*Pass `output=`"
    ):
        estimator.loss(record, Feedback(output=torch.randn(shape)))
