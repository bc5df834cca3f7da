"""Replicas of an engine in two processes: what they do is what one process does on the joint batch."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, VECTOR_ESTIMATORS, assert_close, blobs, mlp, run_step, same_bits
from replicas import ReplicaError, on_ranks
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import StageError
from lightning_dni.estimators import ConvEstimator, MLPEstimator
from lightning_dni.strategies.reducer import PATIENCE, GradientReducer

LINEAR = VECTOR_ESTIMATORS["linear"]
ESTIMATORS = VECTOR_ESTIMATORS | {
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES, batch_norm=False),
    "conv": partial(ConvEstimator, hidden_channels=(), kernel_size=3, num_classes=CLASSES),
}
SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = 5


def net(kind="mlp"):
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(widths=(5, 6, 7, 6, CLASSES))
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.Tanh()) for c in (2, 4)]
    return nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, CLASSES))).double()


def batches(steps=STEPS, kind="mlp", rows=8):
    torch.manual_seed(1)
    if kind == "mlp":
        return [blobs(rows) for _ in range(steps)]
    return [(torch.randn(rows, 2, 4, 4).double(), torch.randint(CLASSES, (rows,))) for _ in range(steps)]


class Replica:
    """A net, its engine and its optimizer; `rank` None for the one process that sees every row."""

    def __init__(
        self, rank, model=None, estimator=LINEAR, boundaries=None, cap=25.0, split=(4, 4), **options
    ):
        self.rank, self.model, self.split = rank, net() if model is None else model, split
        self.reducer = None if rank is None else GradientReducer(cap)
        self.engine = DNIEngine(
            self.model,
            boundaries or [str(k) for k in range(len(self.model) - 1)],
            estimator,
            seed=3,
            exchange=self.reducer,
            rank=rank or 0,
            estimator_optimizer=SGD,
            **options,
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.engine.attach()

    def own(self, batch):
        """This replica's rows."""
        return batch if self.rank is None else self.part(batch, self.rank)

    def part(self, batch, rank):
        return tuple(t.split(self.split)[rank] for t in batch)

    def step(self, batch, loss_of=F.cross_entropy, **options):
        self.optimizer.zero_grad()
        loss = run_step(self.engine, self.model, self.own(batch), loss_of, **options)
        self.update()
        return loss

    def update(self):
        self.optimizer.step()
        self.engine.update_estimators()

    def state(self):
        """All weights and all gradients' presence, by name."""
        found = {n: t.clone() for n, t in self.model.state_dict().items()}
        for boundary, estimator in self.engine.estimators.items():
            found |= {f"{boundary}: {n}": t.clone() for n, t in estimator.state_dict().items()}
        return found


def train(rank, kind="mlp", estimator="linear", **options):
    replica = Replica(rank, net(kind), ESTIMATORS[estimator], **options)
    for batch in batches(kind=kind):
        replica.step(batch)
    return replica.state()


def assert_replicas_do_what_one_does(run, *args, **options):
    """Two processes are equal bit for bit, and to 1e-10 what one is on the joint batch."""
    first, second = on_ranks(partial(run, **options), *args)
    assert same_bits(first, second)
    assert_close(first, run(None, *args, **options), atol=1e-10)
    return first


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


def test_a_failure_on_one_rank_ends_all_at_once():
    with pytest.raises(ReplicaError, match=r"rank 1(?s:.*)to give finite gradients") as caught:
        on_ranks(fails_on_one, seconds=20)
    assert "hangs" not in str(caught.value)


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
