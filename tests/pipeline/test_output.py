"""What the last stage tells of the network's output."""

from functools import partial

import pytest
import torch

from lightning_dni.core.estimator import Signal
from lightning_dni.core.pool import may_ask
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    CriticEstimator,
    DirectFeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
)
from lightning_dni.pipeline.local import LocalChannel
from lightning_dni.pipeline.output import Output


def seen(with_gradient):
    way = LocalChannel()
    output, scores = Output(way, with_gradient), torch.randn(3, 4, requires_grad=True) * 2
    assert output.see({"aux": torch.zeros(2), "scores": scores}) == 4
    return way, output, scores


def test_a_batch_without_rows_is_no_output_of_another_size():
    assert not Output().see(torch.zeros(0, 4, requires_grad=True) * 2, before=4)


def test_output_and_gradient_go_down_together():
    way, output, scores = seen(with_gradient=True)
    scores.square().sum().backward()
    output.send(7)
    message = way.receive()
    assert message.step == 7
    value, gradient = message.tensors
    assert torch.equal(value, scores)
    assert torch.equal(gradient, 2 * scores)
    assert not value.requires_grad


def test_where_nobody_asks_for_the_gradient_the_output_goes_alone():
    way, output, scores = seen(with_gradient=False)
    scores.sum().backward()
    output.send(0)
    assert len(way.receive().tensors) == 1


def test_a_loss_that_does_not_come_back_through_the_output_is_refused():
    _, output, _ = seen(with_gradient=True)
    with pytest.raises(EstimatorError, match=r"Expected one gradient at the network's output .* but got 0"):
        output.send(0)


def test_an_output_of_an_earlier_step_is_not_sent_again():
    way, output, scores = seen(with_gradient=True)
    scores.sum().backward()
    output.send(0)
    with pytest.raises(EstimatorError, match=r"the output module did not run\. .* class or a partial"):
        output.send(1)
    assert len(way) == 1


def test_an_output_that_was_changed_is_not_sent():
    way, output, scores = seen(with_gradient=False)
    scores.div_(2).sum().backward()
    with pytest.raises(EstimatorError, match=r"of the stages below to stay as the .* was changed in place"):
        output.send(0)
    assert not len(way)


def test_where_only_the_gradient_is_asked_for_the_output_may_change():
    output, scores = Output(LocalChannel(), True, with_value=False), torch.ones(3, 4, requires_grad=True) * 2
    output.see(scores)
    scores.div_(2).sum().backward()
    output.send(0)


def test_what_takes_no_gradient_is_not_taken_note_of():
    output = Output(LocalChannel(), with_gradient=True)
    assert output.see(torch.zeros(3, 4)) is None
    with torch.no_grad():
        assert output.see(torch.zeros(3, 4, requires_grad=True)) is None


@pytest.mark.parametrize(
    ("factories", "expected"),
    [
        ([LinearEstimator, CriticEstimator], False),
        ([LinearEstimator, DirectFeedbackAlignmentEstimator], True),
        ([partial(KickbackEstimator, num_classes=3)], True),
        ([lambda spec: LinearEstimator(spec)], True),
    ],
)
def test_who_may_ask_for_the_gradient(factories, expected):
    assert may_ask(factories, {Signal.OUTPUT_GRADIENT}) is expected


def test_an_output_of_another_size_is_refused_where_gradients_were_divided_by_it():
    output, scores = Output(), torch.randn(3, 4, requires_grad=True) * 2
    assert [output.see(scores, before) for before in (None, 4)] == [4, 4]
    with pytest.raises(EstimatorError, match=r"to have 2 elements per row .* but got 4 .* the stages below"):
        output.see(scores, 2)
