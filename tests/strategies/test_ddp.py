"""DNIDDPStrategy in two real processes, against one process and against Lightning's own DDPStrategy."""

import random
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from core.nets import assert_close
from ddp_fits import ddp, fit_on_rank, state_of, trainers
from fits import (
    BOUNDARIES,
    CLASSES,
    FEATURES,
    LINEAR,
    AtBatchEnd,
    Net,
    different,
    dni,
    fit,
    loader,
    net,
    weights,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from processes import TIMEOUT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dni import DNIDDPStrategy, GradientMonitor
from lightning_dni.estimators import LinearEstimator, MLPEstimator

LAMBDAS = (0.0, 0.5, 1.0)


# ---- two processes do what one does on the joint batch


def trained(rank, bp_lambda, options):
    kind = dni if rank is None else ddp
    strategy = kind(bp_lambda=bp_lambda)
    module, _ = fit_on_rank(rank, strategy, devices=1 if rank is None else 2, precision="64-true", **options)
    return state_of(module, strategy)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "max_epochs": 2}, id="accumulated"
        ),
    ],
)
def test_two_processes_do_what_one_does_on_the_joint_batch(bp_lambda, options):
    first, second = trainers(trained, bp_lambda, options)
    assert different(first, second) == []
    assert_close(first, trained(None, bp_lambda, options), atol=1e-10)
    assert different(first, net().double().state_dict() | {n: t for n, t in first.items() if ":" in n})


# ---- at lambda 1 it is Lightning's own DDP


class Uneven(Net):
    """Dropout, batch norm, and a loss per epoch that is averaged over the processes."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True, optimizer="adam")

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, sync_dist=True)
        self.log("epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class Metrics(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        running = {n: b.sum().item() for n, b in module.named_buffers()}
        self.rows.append({k: v.item() for k, v in trainer.callback_metrics.items()} | running)


def as_ddp_does(rank, ours, accumulate):
    torch.manual_seed(7)
    module, metrics = Uneven(), Metrics()
    strategy = ddp(bp_lambda=1.0) if ours else DDPStrategy(timeout=TIMEOUT)
    rows = 46 if rank else 44  # a last batch of its own size on each rank
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 3, "callbacks": [metrics]}
    fit_on_rank(rank, strategy, loader(rows), module=module, val=loader(20 + rank), **options)
    return weights(module), metrics.rows


@pytest.mark.parametrize("accumulate", [1, 4])
def test_at_lambda_1_it_is_lightnings_own_ddp_bit_for_bit(accumulate):
    """With uneven last batches, buffers, dropout, logging over processes and validation."""
    (ours, logged), (ours_1, logged_1) = trainers(as_ddp_does, True, accumulate)
    (plain, logged_plain), (plain_1, logged_plain_1) = trainers(as_ddp_does, False, accumulate)
    assert different(ours, plain) == []
    assert different(ours_1, plain_1) == []
    assert (logged, logged_1) == (logged_plain, logged_plain_1)
    assert logged[-1]["synced"] == logged_1[-1]["synced"] != logged[-1]["loss"]
    assert set(logged[-1]) >= {"synced", "val_loss", "epoch"}


# ---- processes stay equal


def unseeded(spec):
    """An estimator whose weights come from a generator that we do not know of."""
    estimator = LinearEstimator(spec, num_classes=CLASSES)
    with torch.no_grad():
        estimator.map.weight.fill_(1e-2 * random.SystemRandom().random())
    return estimator


class Seed(pl.Callback):
    """Another global seed in every process, after `fit` has set its own."""

    def __init__(self, seed):
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(self.seed)


def with_own_seeds(rank, estimator, apart):
    own = rank if apart else 0
    module, strategy = net(seed=own), ddp(estimator=estimator)
    fit_on_rank(rank, strategy, module=module, callbacks=[Seed(100 + own)])
    return state_of(module, strategy), strategy.engine.describe()["seed"]


def test_replicas_start_as_rank_0_does():
    estimator = partial(MLPEstimator, hidden_sizes=(8,), batch_norm=False)
    (first, seed), (second, other) = trainers(with_own_seeds, estimator, True)
    (as_rank_0, _), _ = trainers(with_own_seeds, estimator, False)
    assert different(first, second) == []
    assert different(first, as_rank_0) == []
    assert seed == other == 100


def test_estimators_become_equal_also_where_their_factory_draws_by_itself():
    (first, _), (second, _) = trainers(with_own_seeds, unseeded, False)
    assert different(first, second) == []


def with_running_averages(rank):
    seen = []
    norm = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
    strategy, module = ddp(estimator=norm), net(batch_norm=True)

    class AtValidation(pl.Callback):
        def on_validation_batch_start(self, trainer, *_):
            if not trainer.sanity_checking:
                seen.append({n: t.clone() for n, t in state_of(module, strategy).items() if "running" in n})

    fit_on_rank(rank, strategy, module=module, val=loader(8), callbacks=[AtValidation()])
    return seen[-1]


def test_running_averages_are_rank_0s_in_validation():
    first, second = trainers(with_running_averages)
    assert different(first, second) == []
    assert {name.rpartition(".")[2] for name in first} == {"running_mean", "running_var"}
    assert any(":" in name for name in first)
    assert any(":" not in name for name in first)


def masks(rank, rng):
    torch.manual_seed(0)
    module, seen = net(dropout=0.5), []
    module.net[0][2].register_forward_hook(lambda *a: seen.append(a[2] == 0))
    ones = DataLoader([[torch.ones(8, FEATURES), torch.zeros(8, dtype=torch.long)]] * 4, batch_size=None)
    fit_on_rank(rank, ddp(rng=rng), ones, module=module)
    return seen[0]


def test_streams_of_stages_differ_between_processes():
    first, second = trainers(masks, "stage")
    assert not torch.equal(first, second)
    same, as_ever = trainers(masks, "global")  # whose seed is the user's
    assert torch.equal(same, as_ever)


def of_one(rank, strategy):
    module, strategy = net(dropout=0.2), strategy(rng="stage")
    fit_on_rank(None, strategy, module=module, devices=1)
    return state_of(module, strategy)


def test_one_process_is_the_strategy_for_one_device_bit_for_bit():
    (alone,) = trainers(of_one, ddp, world_size=1)
    assert different(alone, of_one(0, dni)) == []


# ---- parts of Lightning


def asked_of_ddp(rank):
    events = []

    class Canary(DDPStrategy):
        def configure_ddp(self):
            events.append("configure_ddp")
            super().configure_ddp()

        @contextmanager
        def block_backward_sync(self):
            events.append("block")
            with super().block_backward_sync():
                yield
            events.append("unblock")

        def training_step(self, *args, **kwargs):
            events.append("training_step")
            return super().training_step(*args, **kwargs)

    fit(net(), Canary(timeout=TIMEOUT), loader(24), accumulate_grad_batches=2)
    return events


def test_lightning_wraps_in_configure_ddp_and_blocks_around_batches_that_are_only_accumulated():
    (events,) = trainers(asked_of_ddp, world_size=1)
    batch = ["training_step"]
    assert events == ["configure_ddp", "block", *batch, "unblock", *batch, *batch]


def accumulated(rank):
    seen = []
    look = AtBatchEnd(lambda trainer, module, _: seen.append(module.net[0][0].weight.grad.clone()))
    fit_on_rank(rank, ddp(), callbacks=[look], accumulate_grad_batches=2)
    return seen[4:]  # the estimators gave zero before


def test_only_the_last_accumulated_batch_is_exchanged():
    first, second = trainers(accumulated)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [False, True] * 2


def sampled(rank):
    seen = []
    look = AtBatchEnd(lambda trainer, *_: seen.append(type(trainer.train_dataloader.sampler)))
    fit(net(), ddp(), devices=2, callbacks=[look], train=loader(80))
    return len(seen), set(seen) == {DistributedSampler}


def test_lightning_gives_every_process_its_own_rows():
    assert trainers(sampled) == [(5, True)] * 2


class Unused(Net):
    """A layer that nothing uses, and one that only rank 1 uses, in some steps."""

    def __init__(self):
        super().__init__()
        self.never, self.seldom = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, FEATURES)

    def configure_dni(self):
        return {"boundaries": BOUNDARIES, "estimator": LINEAR}

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_rank == 1 and batch_idx % 3 == 1:
            x = self.seldom(x)
        return super().training_step((x, y), batch_idx)


def unused(rank, path):
    module = Unused()
    trainer = fit_on_rank(rank, "dni_ddp", module=module)[1]
    assert isinstance(trainer.strategy, DNIDDPStrategy)
    return weights(module), module.never.weight.grad is None


def test_by_name_with_options_of_the_module_and_parameters_that_are_not_used():
    torch.manual_seed(0)
    (first, none), (second, none_1) = trainers(unused, None)
    assert different(first, second) == []
    assert none
    assert none_1


def monitored(rank, watches):
    monitor, strategy = GradientMonitor(every_n_train_steps=2), ddp()
    watched = {"callbacks": [monitor], "logger": CSVLogger("."), "log_every_n_steps": 2}
    module, trainer = fit_on_rank(rank, strategy, **(watched if watches else {}))
    finite = {k: v.isfinite().all().item() for k, v in trainer.callback_metrics.items()}
    return state_of(module, strategy), [p.state_dict() for p in monitor.history], finite


def test_a_monitor_measures_all_rows_and_changes_nothing():
    (first, history, finite), (second, history_1, _) = trainers(monitored, True)
    assert different(first, second) == []
    assert history == history_1
    assert len(history) == 4
    assert all(finite.values())
    assert "dni_mean_cosine" in finite
    assert different(first, trainers(monitored, False)[0][0]) == []
