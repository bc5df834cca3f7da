"""Replicas whose control flow is not the same: nothing is lost, and nobody hangs."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, assert_close, mlp, run_step, same_bits
from processes import ReplicaError, on_ranks
from replica import SGD, STEPS, Replica, assert_replicas_do_what_one_does, batches
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import StageError

# ---- control flow that is not the same everywhere


class Cuttable(nn.Module):
    """A stage whose inside depends on who runs it, and when."""

    def __init__(self, inside, chosen):
        super().__init__()
        self.inside, self.chosen = nn.ModuleList(inside), chosen

    def forward(self, x):
        return torch.tanh(self.inside[0](x) + sum(self.inside[k](x) for k in self.chosen()))


def never(step, rank):
    return ()


def branching(rank, choose, bp_lambda=0.0, split=(4, 4)):
    """Two stages, each with parts 1 and 2 that run where `choose(step, rank)` says so; part 3 never does."""
    torch.manual_seed(0)
    now = {}
    stages = [
        Cuttable([nn.Linear(5, 5) for _ in range(4)], lambda: choose(now["step"], now["rank"]))
        for _ in range(2)
    ]
    model = nn.Sequential(*stages, nn.Linear(5, CLASSES)).double()
    replica = Replica(rank, model, bp_lambda=bp_lambda, split=split)
    present = []
    for now["step"], batch in enumerate(batches(8)):
        if rank is None:
            by_hand(replica, batch, now)
        else:
            now["rank"] = rank
            replica.step(batch)
        present.append([n for n, p in model.named_parameters() if p.grad is not None])
    return replica.state(), present


def by_hand(replica, batch, now):
    """Both replicas' passes one after another in one process, whose gradients are added up and halved."""
    replica.optimizer.zero_grad()
    for now["rank"] in range(2):
        own = replica.part(batch, now["rank"])
        run_step(replica.engine, replica.model, own, lambda s, y: F.cross_entropy(s, y) / 2, accumulate=2)
    replica.update()


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(never, id="never"),
        pytest.param(lambda step, rank: (1,) if rank else (), id="on one rank"),
        pytest.param(lambda step, rank: (1 + rank,), id="another on each rank"),
        pytest.param(lambda step, rank: (1 + step % 2,), id="another in each step"),
        pytest.param(lambda step, rank: ((), (1,), (2,), (1, 2))[(step * 3 + rank) % 4], id="at random"),
    ],
)
def test_unused_parameters_need_no_option(choose, bp_lambda):
    (first, present), (second, _) = on_ranks(branching, choose, bp_lambda)
    one, present_in_one = branching(None, choose, bp_lambda)
    assert same_bits(first, second)
    assert_close(first, one, atol=1e-10)
    assert present == present_in_one
    assert not any("inside.3" in name for names in present for name in names)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_every_process_counts_the_same_whatever_its_number_of_rows(bp_lambda):
    first, _ = on_ranks(partial(branching, split=(3, 5)), never, bp_lambda)[0]
    assert_close(first, branching(None, never, bp_lambda, split=(3, 5))[0], atol=1e-10)


def shared(rank):
    """One module is two stages, and part of the last one."""
    torch.manual_seed(0)
    twice = nn.Linear(5, 5)
    model = nn.Sequential(
        nn.Sequential(twice, nn.Tanh()),
        nn.Sequential(twice, nn.Tanh()),
        nn.Sequential(twice, nn.Linear(5, 3)),
    ).double()
    replica = Replica(rank, model)
    for batch in batches():
        replica.step(batch)
    return replica.state()


def test_weights_shared_across_cuts_are_averaged_once():
    assert_replicas_do_what_one_does(shared)


def penalized(rank):
    replica = Replica(rank)
    for k, batch in enumerate(batches(8)):
        weight = replica.model[0][0].weight

        def loss_of(scores, y, k=k, weight=weight):
            return F.cross_entropy(scores, y) + (0.1 * weight.square().sum() if k % 3 == 2 else 0.0)

        replica.step(batch, loss_of)
    return replica.state()


def test_a_weight_penalty_that_comes_late_is_not_lost():
    assert_replicas_do_what_one_does(penalized)


def logging_pass(rank, who=(0, 1)):
    """A forward pass for nothing: in some steps, on some ranks, before or after the one that counts."""
    replica = Replica(rank)
    for k, batch in enumerate(batches(8)):
        extra = (0 if rank is None else rank) in who and k in (3, 4, 6)
        x, y = replica.own(batch)
        replica.optimizer.zero_grad()
        with replica.engine.training_step((x, y)):
            if extra and k != 4:
                replica.model(x + 1.0)
            loss = F.cross_entropy(replica.model(x), y)
            if extra and k == 4:
                replica.model(x - 1.0)
        replica.engine.backward(loss)
        replica.update()
    return replica.state()


@pytest.mark.parametrize("who", [(0, 1), (0,), (1,)])
def test_a_boundary_that_fires_twice_where_one_forward_counts(who):
    first, second = on_ranks(logging_pass, who)
    assert same_bits(first, second)
    assert_close(first, logging_pass(None, (0,)), atol=1e-10)


def keeps_old_gradients(rank):
    """The user's own accumulation, of which the engine is told nothing."""
    replica = Replica(rank)
    for k, batch in enumerate(batches(6)):
        if k % 2 == 0:
            replica.optimizer.zero_grad()
        run_step(replica.engine, replica.model, replica.own(batch))
        if k % 2:
            replica.update()
    return replica.state()


def test_gradients_that_were_not_zeroed_are_seen():
    assert_replicas_do_what_one_does(keeps_old_gradients)


def sparse(rank):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Flatten(), nn.Linear(10, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(5, 5), nn.Tanh()),
        nn.Linear(5, CLASSES),
    ).double()
    replica = Replica(rank, model)
    replica.optimizer = SGD(model.parameters())
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(9, (8, 2), generator=generator)
        replica.step((x, x.sum(1) % CLASSES))
        assert model[0][0].weight.grad.is_sparse
    return replica.state()


def test_sparse_gradients_stay_sparse():
    assert_replicas_do_what_one_does(sparse)


# ---- what cannot go on


def of_unequal_models(rank):
    torch.manual_seed(0)
    replica = Replica(rank, mlp(widths=(5, 6 + rank, 7, 6, CLASSES)))
    replica.step(batches()[0])


def test_unequal_models_are_refused_everywhere():
    with pytest.raises(ReplicaError) as caught:
        on_ranks(of_unequal_models)
    expected = f"{StageError.__name__}: Expected parameter '0.0.weight' to be the same in every process"
    assert str(caught.value).count(expected) == 2


def fails_on_one(rank):
    replica = Replica(rank)
    for k, batch in enumerate(batches()):
        with torch.no_grad():
            if rank == 1 and k == 3:
                replica.engine.estimators["1"].map.weight.fill_(float("nan"))
        replica.step(batch)
        if k == 4:  # processes look together, and not in every step
            replica.engine.check_values()


def test_what_is_not_finite_on_one_rank_ends_all_together():
    with pytest.raises(
        ReplicaError, match=r"rank 1(?s:.*)boundary '1' to give finite gradients.*step 3"
    ) as caught:
        on_ranks(fails_on_one, seconds=20)
    assert "hangs" not in str(caught.value)
    assert "rank 0" in str(caught.value)


def skips_on_one(rank):
    replica = Replica(rank, on_nonfinite="skip")
    for k, batch in enumerate(batches()):
        with torch.no_grad():
            kept = replica.engine.estimators["1"].map.weight.clone() if k else None
            if rank == 1 and k == 3:
                replica.engine.estimators["1"].map.weight.fill_(float("nan"))
        replica.step(batch)
        if rank == 1 and k == 3:
            with torch.no_grad():
                replica.engine.estimators["1"].map.weight.copy_(kept)
    return replica.state(), replica.engine.skipped


def test_what_is_skipped_on_one_rank_hangs_nobody_and_spoils_nothing():
    (first, none), (_, some) = on_ranks(skips_on_one, seconds=20)
    assert set(none.values()) == {0}
    assert some["1"] == 1
    assert all(t.isfinite().all() for t in _tensors(first))


def _tensors(state):
    return [t for t in torch.utils._pytree.tree_leaves(state) if isinstance(t, torch.Tensor)]


def leaves_a_boundary_out(rank):
    replica = Replica(rank)
    first, second, *rest = replica.model
    for k, batch in enumerate(batches()):
        x, y = replica.own(batch)
        replica.optimizer.zero_grad()
        with replica.engine.training_step((x, y)):
            h = first(x)
            h = second.forward(h) if rank == 1 and k == 3 else second(h)
            loss = F.cross_entropy(nn.Sequential(*rest)(h), y)
        replica.engine.backward(loss)
        replica.update()


def test_a_boundary_that_does_not_fire_on_one_rank_ends_all_at_once():
    with pytest.raises(ReplicaError, match=r"rank 1(?s:.*)\['1'\] did not") as caught:
        on_ranks(leaves_a_boundary_out, seconds=20)
    assert "hangs" not in str(caught.value)


def of_three(rank):
    replica = Replica(rank, split=(3, 3, 3))
    for batch in batches(rows=9):
        replica.step(batch)
    return replica.state()


def test_three_processes_do_what_one_does():
    states = on_ranks(of_three, world_size=3)
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])
    assert_close(states[0], of_three(None), atol=1e-10)
