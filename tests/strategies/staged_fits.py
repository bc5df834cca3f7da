"""Fits whose stages are real processes, for tests of what all of them have to agree on."""

import multiprocessing
import warnings

import lightning.pytorch as pl
import torch
from fits import BOUNDARIES, LINEAR, loader, net, quiet_trainer
from processes import on_ranks

from lightning_dni import DNIPipelineStrategy

BELOW = {2: BOUNDARIES[:1], 3: BOUNDARIES}


def staged(stages=2, **options):
    return DNIPipelineStrategy(**{"boundaries": BELOW[stages], "estimator": LINEAR, **options})


def staged_trainer(stages=2, strategy=None, **options):
    """The Trainer of one of the processes; batches in the order of the data set."""
    given = {"devices": stages, "use_distributed_sampler": False, "num_sanity_val_steps": 0, **options}
    return quiet_trainer(strategy or staged(stages), **given)


def fit_staged(stages=2, module=None, train=None, val=None, strategy=None, ckpt_path=None, **options):
    """One of the processes of a fit; returns its Trainer."""
    trainer = staged_trainer(stages, strategy, **options)
    module = net() if module is None else module
    torch.manual_seed(0)
    trainer.fit(module, loader() if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


def on_stages(body, *args, stages=2, seconds=60):
    """`[body(rank, *args) for each rank]`, in processes that find each other as under torchrun."""

    def quietly(rank, *args):
        warnings.simplefilter("ignore")
        multiprocessing.current_process()._config["daemon"] = False  # it may have workers
        return body(rank, *args)

    return on_ranks(quietly, *args, world_size=stages, grouped=False, seconds=seconds)


class Batches(pl.Callback):
    """What each training batch of this process held, as bytes, and the step after it."""

    def __init__(self):
        self.seen, self.steps = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        leaves = torch.utils._pytree.tree_leaves(batch)
        self.seen.append(b"".join(x.numpy().tobytes() for x in leaves if isinstance(x, torch.Tensor)))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
