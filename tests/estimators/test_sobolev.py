"""SobolevEstimator against a critic trained by hand on values and derivatives."""

from functools import partial

import pytest
import torch
from oracles import CriticsByHand, head_by_hand, scores_by_hand
from tables import CLASSES, ESTIMATORS, batch_for, each, lesson, loss_of, network, record_of
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticEstimator, SobolevEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("sobolev")]
SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))
WEIGHT = 0.7


def values_and_derivatives(row, head, h, target, output, above, classes):
    """Cross-entropy to the network's probabilities, and the squared distance of the derivative; per row."""
    log_probabilities = scores_by_hand(head, row, h).log_softmax(-1)
    picked = log_probabilities.gather(-1, classes.unsqueeze(-1))
    (derivative,) = torch.autograd.grad(-picked.sum(), h, create_graph=True)
    share = 0.4 if "share" in row.id else 0.0
    followed = (1 - share) * output.softmax(-1) + share * torch.eye(CLASSES, dtype=h.dtype)[classes]
    values = -(followed * log_probabilities).sum()
    return (values + WEIGHT * (derivative - target).pow(2).sum()) / len(h)


@each(ROWS)
def test_equals_a_hand_written_loop(row):
    """Stages, heads and losses of five steps; the lower head's target has passed the upper boundary."""
    (model, inputs), (twin, _) = network(row, torch.float64), network(row, torch.float64)
    engine = DNIEngine(
        model,
        ["0", "1"],
        lambda spec: row.stirred(dtype=torch.float64),
        labels=1,
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    heads = [head_by_hand(row.stirred(dtype=torch.float64)) for _ in range(2)]
    scores = lambda head, h: scores_by_hand(head, row, h)
    by_hand = CriticsByHand(twin, heads, scores, loss_of, partial(values_and_derivatives, row))
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


def test_without_derivatives_it_is_the_critic():
    h, output, target = torch.randn(6, 5), torch.randn(6, CLASSES), torch.randn(6, 5)
    y = torch.arange(6) % CLASSES
    found = []
    for estimator in (SobolevEstimator(SPEC, CLASSES, derivative_weight=0.0), CriticEstimator(SPEC, CLASSES)):
        torch.manual_seed(0)
        nn.init.normal_(estimator.head.stack.layers[0].weight)
        found.append(lesson(estimator, (h,), y, Feedback(target=(target,), output=output)))
    assert_close(*found)


def test_derivatives_pull_it_towards_the_target_where_values_say_nothing():
    """At the network's own scores the values are learnt; what is left is the derivative's error."""
    estimator = SobolevEstimator(SPEC, CLASSES)
    (layer,) = estimator.head.stack.layers
    nn.init.normal_(layer.weight)
    h, y = torch.randn(6, 5), torch.arange(6) % CLASSES
    record = record_of(estimator, (h,), y)
    feedback = Feedback(target=(record.gradient[0].detach() + 1.0,), output=layer(h).detach())
    values = record_of(estimator, (h,), y)
    reached = Feedback(target=(values.gradient[0].detach(),), output=feedback.output)
    estimator.loss(values, reached).backward()
    assert_close(layer.weight.grad, torch.zeros_like(layer.weight), rtol=0, atol=1e-6)
    estimator.loss(record, feedback).backward()
    assert layer.weight.grad.abs().max() > 0.1


def test_with_labels_alone_it_follows_no_output():
    estimator = SobolevEstimator(SPEC, CLASSES, derivative_weight=0.0, label_share=1.0)
    h, y = torch.randn(6, 5), torch.arange(6) % CLASSES
    record, target = record_of(estimator, (h,), y), (torch.randn(6, 5),)
    outputs = (torch.randn(6, CLASSES), torch.randn(6, CLASSES))
    losses = [estimator.loss(record, Feedback(target=target, output=output)).detach() for output in outputs]
    assert_close(losses[0], losses[1])
    assert_close(losses[0], nn.functional.cross_entropy(estimator.head.stack(h), y).detach())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_refuses_a_share_out_of_range(share):
    with pytest.raises(EstimatorError, match="`label_share` to be from 0 to 1, but got"):
        SobolevEstimator(SPEC, CLASSES, label_share=share)


def test_refuses_an_output_that_is_no_score_per_class():
    estimator = SobolevEstimator(SPEC, CLASSES)
    record = record_of(estimator, (torch.randn(6, 5),), torch.zeros(6, dtype=torch.long))
    feedback = Feedback(target=(torch.randn(6, 5),), output=torch.randn(6, 4))
    with pytest.raises(EstimatorError, match=r"SobolevEstimator at .*shape \(6, 3\), but got \(6, 4\).*`out"):
        estimator.loss(record, feedback)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_refuses_a_weight_out_of_range(weight):
    with pytest.raises(EstimatorError, match="`derivative_weight` to be a number of at least 0, but got"):
        SobolevEstimator(SPEC, CLASSES, derivative_weight=weight)
