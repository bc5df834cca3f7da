"""Regions that torch.utils.checkpoint runs again, with boundaries inside: the numbers are those without."""

import gc
import weakref
from functools import partial

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, grads, mlp, update, weights
from core.predicted import SMALL
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_dni.core import SplitOptimizer
from lightning_dni.core.tap import saved_as_ever
from lightning_dni.errors import StageError
from lightning_dni.estimators import (
    CriticCascade,
    CriticEstimator,
    LinearEstimator,
    LocalLossEstimator,
    MLPEstimator,
    SobolevEstimator,
)

run_again = partial(checkpoint, use_reentrant=False)
BOUNDARIES = ["0", "1"]
CLASSIFIES = {"num_classes": CLASSES}
LINEAR = partial(LinearEstimator, **CLASSIFIES)
ESTIMATORS = {
    "linear": LINEAR,
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), **CLASSIFIES),
    "critic": partial(CriticEstimator, label_share=0.5, **CLASSIFIES),
    "hidden": partial(CriticEstimator, hidden_sizes=(8,), **CLASSIFIES),
    "sobolev": partial(SobolevEstimator, **CLASSIFIES),
    "cascade": partial(CriticCascade, **CLASSIFIES),
    "similarity": partial(LocalLossEstimator, similarity=0.5, **CLASSIFIES),
}


class Checkpointed(nn.Module):
    """Three stages; `regions` says what is run again: nothing, each stage below the last, or both as one."""

    def __init__(self, regions):
        super().__init__()
        self.regions = regions
        for name, stage in mlp((5, 6, 7, CLASSES), dropout=0.3).named_children():
            self.add_module(name, stage)

    def forward(self, x):
        first, second, last = self.children()
        if self.regions == "each":
            return last(run_again(second, run_again(first, x)))
        if self.regions == "both":
            return last(run_again(lambda x: second(first(x)), x))
        return last(second(first(x)))


def trained(regions, estimator=LINEAR, **options):
    """The weights after some steps."""
    torch.manual_seed(0)
    model = Checkpointed(regions)
    user = torch.optim.SGD(model.parameters(), 0.3)
    engine = attached(model, BOUNDARIES, estimator, seed=7, **options)
    engine.updater = SplitOptimizer(user) if options.get("update") == "immediate" else None
    for _ in range(4):
        update(engine, model, user, [(torch.randn(8, 5).double(), torch.randint(CLASSES, (8,)))])
    return weights(model)


@pytest.mark.parametrize("options", [{}, {"bp_lambda": 0.5}, {"estimator_steps": 2}], ids=str)
@pytest.mark.parametrize("regions", ["each", "both"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains_as_without_a_checkpoint(estimator, regions, options):
    """Torch counted what estimators keep among what the region keeps, and missed it when that ran again."""
    one, other = (trained(r, ESTIMATORS[estimator], **options) for r in (regions, None))
    assert_close(one, other, 0.0)


OPTIONS = {
    "update='immediate'": {"update": "immediate"},
    "rng='stage'": {"rng": "stage"},
    "synthetic inputs": {"synthetic_inputs": SMALL},
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("what", OPTIONS)
def test_a_checkpoint_around_one_stage_goes_with_every_option(what, early_stop):
    with set_checkpoint_early_stop(early_stop):
        one, other = (trained(r, ESTIMATORS["critic"], **OPTIONS[what]) for r in ("each", None))
    assert_close(one, other, 0.0)


@pytest.mark.parametrize("what", OPTIONS)
def test_a_checkpoint_around_several_is_refused_where_they_would_run_otherwise(what):
    """The upper stage's activations were made again from other weights, inputs or masks: a wrong gradient."""
    with pytest.raises(StageError, match=f"one stage in an activation checkpoint with {what}, but .* '0'"):
        trained("both", **OPTIONS[what])


def test_full_lambda_with_streams_by_stage_is_refused_too():
    with pytest.raises(StageError, match="in an activation checkpoint with rng='stage'"):
        trained("both", rng="stage", bp_lambda=1.0)


def test_updates_that_are_deferred_are_made_at_unchanged_weights():
    one, other = (trained(r, update="immediate", bp_lambda=0.5) for r in ("both", None))
    assert_close(one, other, 0.0)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("regions", ["each", "both"])
@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
def test_what_runs_again_inside_of_the_block_of_several_losses_is_not_cut_again(
    bp_lambda, regions, early_stop
):
    """The backward pass is in that block, too: estimators were asked again, and no leak was taken for one."""
    ends, asked = [], []

    class Asked(Told):
        def synthesize(self, h, context, state):
            asked[-1] += 1
            return super().synthesize(h, context, state)

    for each in (regions, None):
        torch.manual_seed(0)
        model = Checkpointed(each)
        engine = attached(model, BOUNDARIES, Asked, bp_lambda=bp_lambda)
        asked.append(0)
        with set_checkpoint_early_stop(early_stop), engine.training_step(several_losses=True):
            for _ in range(2):
                engine.backward(model(torch.randn(8, 5).double()).square().sum())
        ends.append(grads(model))
    assert_close(*ends, 0.0)
    assert asked == [4, 4]


def test_a_graph_that_nobody_differentiates_is_gone_without_the_garbage_collector():
    """What a graph saves of its own output would keep the graph, if a hook handed that on as it is."""
    gc.disable()
    try:
        with saved_tensors_hooks(lambda x: 0, lambda x: x), saved_as_ever():
            y = torch.ones(3, requires_grad=True).exp()
        ref = weakref.ref(y)
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_a_graph_inside_of_a_checkpoint_may_be_differentiated_twice():
    x = torch.ones(3, requires_grad=True)
    with saved_tensors_hooks(lambda x: 0, lambda x: x), saved_as_ever():
        (once,) = torch.autograd.grad(x.exp().square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), x)
    torch.testing.assert_close(twice, 4 * torch.full((3,), 2.0).exp())
