"""Every stage clips by itself: to its share of a norm, or to a value."""

import math

import pytest
import torch
from fits import fit, loader, net, weights
from strategies.staged_fits import BELOW, fit_staged, on_stages, staged

from lightning_dni import DNIStrategy

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
