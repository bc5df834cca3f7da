"""Stages at staleness D, without processes: a loop with that lag, and what has to be without one."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS, Told, mlp
from oracles import mlp_stages
from pipeline.lagged import NaiveLaggedCascade, NaiveLaggedDNI
from pipeline.staged import OPTIMIZERS, WAITING, WIDTHS, batches, together
from torch import nn

from lightning_dni.core import Signal
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticCascade, LinearEstimator


def beside_a_loop(make_naive, estimator, staleness):
    """Train stages and a hand-written loop with the same lag, which do the same in every step."""
    torch.manual_seed(0)
    model, data = mlp_stages((5, 6, 7, 6), CLASSES, batch_norm=True), batches(dtype=torch.float64)
    naive = make_naive(copy.deepcopy(model), (6, 7, 6), CLASSES, staleness)
    staged = together(
        model,
        partial(estimator, num_classes=CLASSES),
        data,
        staleness,
        estimator_optimizer=partial(torch.optim.SGD, lr=0.05),
    )
    user = OPTIMIZERS["sgd"](naive.stages.parameters())
    for batch in data:
        loss = staged.step([batch])
        user.zero_grad()
        expected = naive.gradients(*batch)
        user.step()
        naive.update()
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for name, value in staged.state_dict().items():
        torch.testing.assert_close(value, naive.stages.state_dict()[name], atol=1e-10, rtol=0)
    return staged, naive


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_with_lag_stages_are_the_loop_with_that_lag(staleness):
    beside_a_loop(NaiveLaggedDNI, LinearEstimator, staleness)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_with_lag_a_cascade_is_the_loop_with_that_lag(staleness):
    staged, naive = beside_a_loop(NaiveLaggedCascade, CriticCascade, staleness)
    for k, head in enumerate(naive.heads):
        (found,) = staged.engines[k].estimators[str(k)].head.stack.layers
        assert found.weight.any()
        torch.testing.assert_close(found.weight, head.weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["linear", "mlp"])
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_loader_may_write_its_batches_into_the_same_tensors(name, staleness):
    """The labels that belong to a target are those that were there when it was a prediction."""
    ends, data = [], [batch for batch in batches(12) if len(batch[1]) == 8]
    for reuses in (False, True):
        torch.manual_seed(0)
        buffers = [torch.empty_like(each) for each in data[0]]
        staged = together(mlp(WIDTHS[3], dtype=torch.float32), VECTOR_ESTIMATORS[name], data, staleness)
        for batch in data:
            into = [a.copy_(b) for a, b in zip(buffers, batch, strict=True)]
            staged.step([tuple(into) if reuses else batch])
        ends.append(staged.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_lag_changes_what_is_learnt():
    data = batches()
    torch.manual_seed(0)
    model = mlp(WIDTHS[3], dtype=torch.float32)
    ends = []
    for staleness in (0, 1, 2):
        staged = together(model, VECTOR_ESTIMATORS["linear"], data, staleness)
        for batch in data:
            staged.step([batch])
        ends.append(staged.state_dict()["0.0.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_outputs_come_down_one_stage_per_lag():
    """A critic two stages below the loss learns from outputs of 2 D updates ago, one stage below D."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(10)
    staged = together(model, VECTOR_ESTIMATORS["critic"], data, staleness=2)
    learnt = {name: [] for name in ("0", "1")}
    for batch in data:
        before = [copy.deepcopy(e.estimators) for e in staged.engines]
        staged.step([batch])
        for name in learnt:
            old, now = before[int(name)].get(name), staged.engines[int(name)].estimators[name]
            same = old is not None and all(
                torch.equal(p, q) for p, q in zip(old.parameters(), now.parameters(), strict=True)
            )
            learnt[name].append(old is not None and not same)
    assert learnt == {"0": [False] * 4 + [True] * 6, "1": [False] * 2 + [True] * 8}


def test_a_lag_and_a_stage_that_waits_exclude_each_other():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(2)
    staged = together(model, VECTOR_ESTIMATORS["linear"], data, staleness=1, bp_lambda=0.5)
    with pytest.raises(EstimatorError, match=r"staleness=1, but got bp_lambda=0.5 .* Pass staleness=0"):
        staged.step([data[0]])


@pytest.mark.parametrize("name", WAITING)
def test_a_lag_and_an_estimator_that_is_told_first_exclude_each_other(name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(2)
    staged = together(model, WAITING[name], data, staleness=1)
    with pytest.raises(EstimatorError, match=r"Estimator at boundary '0', which is told first, .*ness=0"):
        staged.step([data[0]])


@pytest.mark.parametrize("staleness", [-1, True])
def test_a_lag_that_is_no_number_of_updates_is_refused(staleness):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(1)
    with pytest.raises(EstimatorError, match=r"Expected `staleness` to be an integer of at least 0"):
        together(model, VECTOR_ESTIMATORS["linear"], data, staleness)


class Short(Told):
    """Counts on the graph of what it has said, which there is only where nothing lags."""

    needs = frozenset({Signal.TARGET})

    def __init__(self, spec):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.zeros(()))

    def synthesize(self, h, context, state):
        return (self.weight * h[0],), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


def test_a_loss_without_a_graph_is_refused_by_name():
    data = batches(4)
    float32 = partial(mlp, WIDTHS[2], dtype=torch.float32)
    for batch in data:
        together(float32(), Short, data).step([batch])
    lagged = together(float32(), Short, data, staleness=1)
    lagged.step([data[0]])
    with pytest.raises(EstimatorError, match=r"the loss of Short at boundary '0' .* without a graph"):
        lagged.step([data[1]])
