"""Fits of one module in several processes, one per stage, and what they leave behind."""

import os
import warnings

import torch
from fits import LINEAR, Losses, loader, net, quiet_trainer, weights
from processes import on_ranks

from lightning_dni import DNIPipelineStrategy

STAGES = {2: ["net.0"], 3: ["net.0", "net.1"]}


def pipeline(stages=3, **options):
    return DNIPipelineStrategy(
        **{"boundaries": STAGES[stages], "estimator": LINEAR, "staleness": 0, **options}
    )


def fit_stage(rank, stages, make, options, fit):
    """One process of a fit: the module's weights, the losses that were logged, the estimators' weights."""
    warnings.simplefilter("ignore")
    os.environ["PL_GLOBAL_SEED"] = "0"
    losses = Losses()
    module = make()
    trainer = quiet_trainer(
        pipeline(stages, **options),
        devices=stages,
        callbacks=[losses] if rank == 0 else [],
        **{"max_epochs": 2, "use_distributed_sampler": False, **fit.get("trainer", {})},
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(**fit.get("loader", {})), fit.get("val"))
    return {
        "weights": weights(module),
        "losses": losses.train,
        "val": losses.val,
        "estimators": {n: weights(e) for n, e in trainer.strategy.engine.estimators.items()},
        "step": trainer.global_step,
    }


def fit_pipeline(stages=3, make=net, options=None, seconds=90, **fit):
    """What every rank has to say, rank 0 first."""
    return on_ranks(
        fit_stage, stages, make, options or {}, fit, world_size=stages, grouped=False, seconds=seconds
    )
