"""Collectives of the user's beside ours, batch norm over all processes, and sums of three terms."""

import pytest
import torch
import torch.distributed as dist
from core.nets import assert_close
from ddp_fits import ddp, fit_on_rank, state_of, trainers
from fits import FEATURES, AtBatchEnd, Net, different, dni, fit, loader, net, weights
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import DDPStrategy
from processes import TIMEOUT, ReplicaError
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.utils.data import DataLoader

LAMBDAS = (0.0, 0.5, 1.0)

# ---- the user's collectives


class Talks(Net):
    """Reduces its loss in training_step, when a bucket has been sent by rank 0 alone, in some steps."""

    def __init__(self):
        super().__init__()
        self.seldom = nn.Linear(FEATURES, FEATURES)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_rank == 0 or batch_idx % 3 != 1:
            x = self.seldom(x)
        loss = F.cross_entropy(self(x), y)
        self.log("synced", loss, sync_dist=True)
        return loss


def talking(rank):
    torch.manual_seed(0)
    module = Talks()
    trainer = fit_on_rank(rank, ddp(), module=module, max_epochs=3)[1]
    return weights(module), trainer.callback_metrics["synced"].item()


def test_a_bucket_that_goes_out_late_in_one_process_meets_no_collective_of_the_users():
    (first, synced), (second, synced_1) = trainers(talking)
    assert different(first, second) == []
    assert synced == synced_1


# ---- batch norm over all processes


class JointNorm(nn.BatchNorm1d):
    """What SyncBatchNorm does where it runs (not on CPUs): statistics of all processes' rows."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        rows = len(x) * dist.get_world_size()
        mean, square = all_reduce(torch.stack([x.sum(0), x.square().sum(0)])) / rows
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / (rows - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class JointNorms(LayerSync):
    """Lightning's plugin for `sync_batchnorm=True`, with JointNorm in place of torch's."""

    def _exchange(self, module, old, new):
        for name, child in module.named_children():
            if type(child) is old:
                made = new(child.num_features)
                made.__dict__.update(child.__dict__)
                setattr(module, name, made)
            self._exchange(child, old, new)
        return module

    def apply(self, model):
        return self._exchange(model, nn.BatchNorm1d, JointNorm)

    def revert(self, model):
        return self._exchange(model, JointNorm, nn.BatchNorm1d)


def normed(rank, bp_lambda):
    module = net(batch_norm=True).double()
    kind, devices, plugins = (dni, 1, []) if rank is None else (ddp, 2, [JointNorms()])
    for _ in range(2):  # the layers are exchanged again in the second fit
        strategy = kind(bp_lambda=bp_lambda)
        fit_on_rank(rank, strategy, module=module, devices=devices, plugins=plugins, precision="64-true")
    assert {type(m) for m in module.modules() if isinstance(m, nn.BatchNorm1d)} == {nn.BatchNorm1d}
    return state_of(module, strategy)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_with_batch_norm_over_all_processes_they_do_what_one_does_on_the_joint_batch(bp_lambda):
    first, second = trainers(normed, bp_lambda)
    assert different(first, second) == []
    assert_close(first, normed(None, bp_lambda), atol=1e-10)


def on_cpus(rank, strategy):
    fit_on_rank(rank, strategy(timeout=TIMEOUT), module=net(batch_norm=True), sync_batchnorm=True)


@pytest.mark.parametrize("strategy", [ddp, DDPStrategy], ids=["ours", "plain"])
def test_torchs_own_says_that_it_does_not_run_on_cpus(strategy):
    with pytest.raises(ReplicaError, match=r"ValueError: SyncBatchNorm .* GPU"):
        trainers(on_cpus, strategy, seconds=20)


def test_on_one_device_there_is_nothing_to_synchronize():
    ends = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        module = net(batch_norm=True)
        fit(module, strategy, sync_batchnorm=True)
        ends.append(weights(module))
    assert different(*ends) == []


# ---- three processes at lambda 1


def rows_of_three(rank):
    return DataLoader([[t[rank::3] for t in batch] for batch in loader(72, 9)], batch_size=None)


def three(rank, ours, precision):
    """The gradients after the first step, and the weights at the end."""
    seen = []
    keep = AtBatchEnd(lambda trainer, module, _: seen.append(gradients(module)))
    module, _ = fit_on_rank(
        rank,
        ddp(bp_lambda=1.0) if ours else DDPStrategy(timeout=TIMEOUT),
        rows_of_three(rank),
        devices=3,
        precision=precision,
        callbacks=[keep],
        max_epochs=3,
    )
    return seen[0], weights(module)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def term(rank):
    """What a process adds to the sum in its first step."""
    module = net()
    x, y = next(iter(rows_of_three(rank)))
    F.cross_entropy(module(x), y).backward()
    return {name: gradient / 3 for name, gradient in gradients(module).items()}


def test_with_three_processes_lightnings_own_ddp_differs_by_the_order_of_sums_alone():
    """Two terms have one sum, three have three: which is taken depends on the place in the bucket.

    Each is within 2u of the exact one, as a share of the sum of absolute values (u = eps / 2), so they are
    within 4u of one another.
    """
    (ours, _), (plain, _) = (trainers(three, which, "32-true", world_size=3)[0] for which in (True, False))
    terms = [term(rank) for rank in range(3)]
    u = torch.finfo(torch.float32).eps / 2
    for name in ours:
        bound = 4 * u * (1 + 4 * u) * sum(each[name].abs() for each in terms)
        assert ((ours[name] - plain[name]).abs() <= bound).all(), name


def test_with_three_processes_runs_stay_together_in_double_precision():
    """To a thousand times the rounding of one sum, after 24 steps that each add theirs."""
    ours, plain = (trainers(three, which, "64-true", world_size=3) for which in (True, False))
    assert different(ours[0][1], ours[1][1]) == different(ours[0][1], ours[2][1]) == []
    assert_close(ours[0][1], plain[0][1], atol=1e-13)
