"""Stages clip: each to its share of a norm, all by a norm that is some updates old, or to a value."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from core.nets import unchecked
from fits import LINEAR, fit, loader, net, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from strategies.staged_fits import BELOW, fit_staged, on_stages, staged
from torch import nn

from lightning_dni import DNIPipelineStrategy, DNIStrategy
from lightning_dni.estimators import DelayedGradientEstimator
from lightning_dni.pipeline.norms import LaggedNorm
from lightning_dni.strategies.clipping import clip_lagged, clip_share

STAGE_OF = {2: {"net.0": 0, "net.1": 1, "net.2": 1}, 3: {"net.0": 0, "net.1": 1, "net.2": 2}}


def clipped(rank, stages, options):
    module = net()
    fit_staged(stages, module, strategy=staged(stages, staleness=0), **options)
    return weights(module)


def by_hand(stages, clip):
    """One process, whose module clips the gradients of each stage."""
    module = net()

    def configure(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        for stage in range(stages):
            names = [name for name, k in STAGE_OF[stages].items() if k == stage]
            clip([p for n in names for p in module.get_submodule(n).parameters()])

    module.configure_gradient_clipping = configure
    strategy = DNIStrategy(BELOW[stages], staged(stages)._options.estimator, rng="stage")
    fit(module, strategy, loader())
    return weights(module)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_norm_is_clipped_to_the_stages_share(stages):
    share = 0.05 / math.sqrt(stages)
    expected = by_hand(stages, lambda own: torch.nn.utils.clip_grad_norm_(own, share))
    for found in on_stages(clipped, stages, {"gradient_clip_val": 0.05}, stages=stages):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_values_are_clipped_as_they_are():
    expected = by_hand(2, lambda own: torch.nn.utils.clip_grad_value_(own, 0.01))
    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    for found in on_stages(clipped, 2, options):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_precision_plugin_clips_as_before_once_the_fit_is_over():
    def body(rank):
        plugin = fit_staged(gradient_clip_val=0.1).precision_plugin
        return "clip_grad_by_norm" in vars(plugin)

    assert on_stages(body) == [False, False]


# ---- by the norm over all stages, some updates ago


LIMIT = 0.1


class Norms(pl.Callback):
    """The norm of this stage's gradients in every update, before it is clipped and after."""

    def __init__(self):
        self.before, self.after = [], []

    @staticmethod
    def of(module):
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        return torch.cat([torch.zeros(1), *gradients]).norm().item()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before.append(self.of(module))

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step > len(self.after):
            self.after.append(self.of(module))


def lagged(rank, stages, staleness, options):
    norms = Norms()
    options = {"estimator": LINEAR, **options}
    strategy = staged(stages, staleness=staleness, clip_norm="lagged", estimator=options.pop("estimator"))
    fit_staged(stages, strategy=strategy, callbacks=[norms], gradient_clip_val=LIMIT, max_epochs=3, **options)
    return norms


@pytest.mark.parametrize(
    ("stages", "staleness", "options"),
    [
        (2, 0, {}),
        (3, 0, {}),
        (3, 2, {}),
        (2, 1, {"accumulate_grad_batches": 3}),
        (3, 1, {"val_check_interval": 4}),
        (3, 2, {"estimator": partial(DelayedGradientEstimator, delay=2)}),
    ],
)
def test_all_stages_clip_by_the_norm_that_they_had_together(stages, staleness, options):
    found = on_stages(lagged, stages, staleness, options, stages=stages)
    lag = 1 + (stages - 1) * (staleness + 1)
    together = [math.hypot(*norms) for norms in zip(*(rank.before for rank in found), strict=True)]
    assert len(together) > 2 * lag
    for rank in found:
        for update, (before, after) in enumerate(zip(rank.before, rank.after, strict=True)):
            if update < lag:
                expected = before * min(1.0, LIMIT / math.sqrt(stages) / (before + 1e-6))
            else:
                expected = before * min(1.0, LIMIT / (together[update - lag] + 1e-6))
            assert after == pytest.approx(expected, rel=1e-5)
    assert max(together[:-lag]) > LIMIT  # it does clip by them


def test_a_frozen_stage_has_nothing_to_clip():
    norm, clipped = LaggedNorm(1, 2, 0), nn.Parameter(torch.ones(4))
    for clip in (clip_lagged(2, norm), clip_share(2)):
        clip([clipped], LIMIT)  # no gradient, no norm
        assert clipped.grad is None
    assert norm.state_dict()["own"] == 0.0


def test_another_way_to_clip_is_refused():
    with unchecked(), pytest.raises(MisconfigurationException, match="or 'lagged', but got 'all'"):
        staged(clip_norm="all")
    with pytest.raises(MisconfigurationException, match="no `clip_norm` with an exact schedule"):
        DNIPipelineStrategy(boundaries=["net.0"], schedule="1f1b", microbatches=2, clip_norm="lagged")
