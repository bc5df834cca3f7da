"""Fits of one module in several processes, one per stage, and what they leave behind."""

import os
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
from fits import LINEAR, Losses, fit, loader, net, quiet_trainer, weights
from processes import on_ranks

from lightning_dni import DNIPipelineStrategy, DNIStrategy

STAGES = {2: ["net.0"], 3: ["net.0", "net.1"], 4: ["net.0", "net.1", "net.2"]}


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
        "estimators": {n: weights(e) for n, e in trainer.strategy.estimators.items()},
        "step": trainer.global_step,
    }


def fit_pipeline(stages=3, make=net, options=None, seconds=90, **fit):
    """What every rank has to say, rank 0 first."""
    return on_ranks(
        fit_stage, stages, make, options or {}, fit, world_size=stages, grouped=False, seconds=seconds
    )


# ---- the same fit in a pipeline and in one process


USUAL = partial(net, dropout=0.3, batch_norm=True)
TEN_BATCHES = partial(loader, rows=76)


@dataclass(frozen=True)
class Case:
    """A fit: of what, on what, how.

    Attributes:
        make: Makes the module.
        options: Of the strategy, beside boundaries and estimator.
        trainer: Of the Trainer.
        data: Makes the loader: 10 batches, the last of which is a partial one.
        epochs: Of 10 batches.
    """

    make: Any = USUAL
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: Any = TEN_BATCHES
    epochs: int = 5

    def in_one_process(self, stages):
        """The losses, and the module and the strategy as they are afterwards."""
        module, losses = self.make(), Losses()
        options = {key: value for key, value in self.options.items() if key != "staleness"}
        strategy = DNIStrategy(
            **{"boundaries": STAGES[stages], "estimator": LINEAR, "rng": "stage"} | options
        )
        fit(module, strategy, self.data(), max_epochs=self.epochs, callbacks=[losses], **self.trainer)
        return losses.train, module, strategy

    def as_stage(self, rank, stages):
        """One process of the pipeline; what it ends with."""
        module, losses = self.make(), Losses()
        strategy = pipeline(stages, **self.options)
        fit(
            module,
            strategy,
            self.data(),
            max_epochs=self.epochs,
            devices=stages,
            use_distributed_sampler=False,
            callbacks=[losses] if rank == 0 else [],
            **self.trainer,
        )
        return {
            "losses": losses.train,
            "weights": weights(module),
            "estimators": {n: weights(e) for n, e in strategy.estimators.items()},
            "skipped": strategy.engine.skipped,
        }


def fit_cases(stages, cases, seconds=240):
    """What every rank has to say of every case, all fitted in one set of processes: `{name: [by rank]}`."""
    return in_turn(
        stages, {name: partial(case.as_stage, stages=stages) for name, case in cases.items()}, seconds
    )


def in_turn(stages, scenes, seconds=240):
    """What every rank says of every `function(rank)` in `scenes`, all in one set of processes."""
    said = on_ranks(_play_in_turn, scenes, world_size=stages, grouped=False, seconds=seconds)
    errors = [f"rank {rank}, {found['error']}" for rank, found in enumerate(said) if "error" in found]
    assert not errors, "\n".join(errors)
    return {name: [found[name] for found in said] for name in scenes}


def once(function):
    """Cache what `function` returns or raises: what fails is not tried again by every test that asks."""

    @cache
    def outcome(*args):
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    @wraps(function)
    def call(*args):
        found, error = outcome(*args)
        if error is not None:
            raise error
        return found

    return call


def _play_in_turn(rank, scenes):
    warnings.simplefilter("ignore")
    os.environ["PL_GLOBAL_SEED"] = "0"
    found = {}
    try:
        for name, scene in scenes.items():
            found[name] = scene(rank)
    except Exception:  # the others are told, and end as well
        found["error"] = f"{list(scenes)[len(found)]}: {traceback.format_exc()}"
    return found
