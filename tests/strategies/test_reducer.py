"""Replicas of an engine in two processes: what they do is what one process does on the joint batch."""

import pytest
import torch
from core.nets import LAMBDAS, VECTOR_ESTIMATORS, run_step, same_bits
from processes import on_ranks
from replica import ESTIMATORS, STEPS, Replica, assert_replicas_do_what_one_does, batches, net
from torch import nn
from torch.nn import functional as F

from lightning_dni.strategies.reducer import PATIENCE


def train(rank, kind="mlp", estimator="linear", **options):
    replica = Replica(rank, net(kind), ESTIMATORS[estimator], **options)
    for batch in batches(kind=kind):
        replica.step(batch)
    return replica.state()


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("estimator", VECTOR_ESTIMATORS)
def test_replicas_do_what_one_process_does_on_the_joint_batch(estimator, bp_lambda):
    trained = assert_replicas_do_what_one_does(train, "mlp", estimator, bp_lambda=bp_lambda)
    before = net().state_dict()
    moved = [n for n in before if not torch.equal(trained[n], before[n])]
    below_stays = estimator == "zero" and bp_lambda == 0
    assert moved == [n for n in before if n.startswith("3") or not below_stays]


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_so_they_do_on_maps(bp_lambda):
    assert_replicas_do_what_one_does(train, "conv", "conv", bp_lambda=bp_lambda)


@pytest.mark.parametrize("estimator", ["linear", "mlp", "local_loss", "critic"])
def test_further_steps_of_the_estimators_are_averaged_too(estimator):
    assert_replicas_do_what_one_does(train, "mlp", estimator, estimator_steps=3)


def test_a_bucket_may_be_smaller_than_a_parameter():
    assert_replicas_do_what_one_does(train, cap=1e-5)


def accumulating(rank, bp_lambda=0.0, windows=(2, 3, 1), early=None):
    replica = Replica(rank, bp_lambda=bp_lambda)
    data = iter(batches(sum(windows)))
    for size in windows:
        replica.optimizer.zero_grad()
        for k in range(size):
            run_step(
                replica.engine,
                replica.model,
                replica.own(next(data)),
                lambda scores, y, size=size: F.cross_entropy(scores, y) / size,
                accumulate=size,
                first=k == 0,
                last=k == size - 1,
            )
        if early is not None:
            early.append(replica.reducer.launched_early)
        nn.utils.clip_grad_norm_(replica.model.parameters(), 0.3)
        replica.update()
    return replica.state()


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_accumulated_and_clipped_gradients_are_those_of_the_joint_batch(bp_lambda):
    assert_replicas_do_what_one_does(accumulating, bp_lambda=bp_lambda)


# ---- overlap


def count_launches(rank, bp_lambda=0.0, estimator="linear"):
    """Buckets already sent when each stage's forward begins, per step."""
    replica, seen = Replica(rank, estimator=ESTIMATORS[estimator], bp_lambda=bp_lambda), []
    for child in replica.model:
        child.register_forward_pre_hook(lambda *_: seen[-1].append(replica.reducer.launched))
    for batch in batches():
        seen.append([])
        replica.step(batch)
        seen[-1].append(replica.reducer.launched_early)
    return seen


@pytest.mark.parametrize(
    ("estimator", "sent"),
    [
        ("linear", [0, 1, 2, 3, 4]),  # the fourth: last stage, and estimator of the topmost boundary
        ("local_loss", [0, 1, 2, 3, 4]),
        ("zero", [0, 0, 0, 0, 1]),
    ],
)
def test_a_stage_is_sent_before_the_next_stage_runs(estimator, sent):
    for seen in on_ranks(count_launches, 0.0, estimator):
        assert seen == [[0, 0, 0, 0, 0]] + [sent] * (STEPS - 1)


def count_early(rank, how):
    early = []
    if how == "accumulating":
        accumulating(rank, windows=(2, 3, 1, 2), early=early)
        return early
    replica = Replica(rank)
    for batch in batches(4):
        x, y = replica.own(batch)
        with replica.engine.training_step((x, y)):
            loss = F.cross_entropy(replica.model(x), y)
        replica.optimizer.zero_grad()  # here, as Lightning does
        replica.engine.backward(loss)
        early.append(replica.reducer.launched_early)
        replica.update()
    return early


@pytest.mark.parametrize("how", ["accumulating", "zeroing after the forward pass"])
def test_gradients_of_earlier_batches_are_told_from_old_ones(how):
    assert on_ranks(count_early, how) == [[0, 4, 4, 4]] * 2


def change_lambda(rank):
    replica, early = Replica(rank), []
    for k, batch in enumerate(batches(3 * PATIENCE + 6)):
        replica.engine.set_bp_lambda(1.0 if k < 3 else 0.0)
        replica.step(batch)
        early.append(replica.reducer.launched_early)
    return replica.state(), early


def test_the_plan_follows_when_lambda_changes_for_good():
    (first, early), (second, _) = on_ranks(change_lambda)
    assert same_bits(first, second)
    assert early[:3] == [0, 1, 1]  # backprop: one bucket, after the loss
    assert early[2 * PATIENCE :] == [4] * (PATIENCE + 6)
