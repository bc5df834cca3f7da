"""Fits under DNIDDPStrategy in two real processes."""

from fits import (
    BOUNDARIES,
    LINEAR,
    fit,
    loader,
    net,
    weights,
)
from processes import TIMEOUT, on_ranks
from torch.utils.data import DataLoader

from lightning_dni import DNIDDPStrategy


def ddp(**options):
    return DNIDDPStrategy(**{"boundaries": BOUNDARIES, "estimator": LINEAR, "timeout": TIMEOUT, **options})


def trainers(function, *args, world_size=2, **options):
    """Run `function(rank, *args)` where a Trainer finds two processes; returns what both gave."""
    return on_ranks(function, *args, world_size=world_size, grouped=False, **options)


def fit_on_rank(rank, strategy, train=None, devices=2, module=None, **options):
    """A fit in one of the processes; without `train` each has its rows of the same batches."""
    module = net() if module is None else module
    own = {"use_distributed_sampler": False, "train": rows_of(rank) if train is None else train}
    return module, fit(module, strategy, devices=devices, **{**own, **options})


def rows_of(rank, rows=64, batch_size=8):
    """The rows of a process, of every batch; None for all."""
    batches = list(loader(rows, batch_size))
    own = batches if rank is None else [[t[rank::2] for t in batch] for batch in batches]
    return DataLoader(own, batch_size=None)


def state_of(module, strategy):
    """The weights of the module and of the estimators."""
    found = weights(module)
    for boundary, estimator in strategy.engine.estimators.items():
        found |= {f"{boundary}: {n}": t.clone() for n, t in estimator.state_dict().items()}
    return found
