"""Options together, each training against the same one written out by hand, in double precision."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES, assert_close, attached, blobs, mlp, update, weights
from core.paper import BOUNDARIES, WIDTHS
from core.recurrent import OUTPUTS, Net, closely, draw_chunks, engine_of, train, train_by_hand, width_of
from core.test_sparse import awake_in
from oracles import LinearMap
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import SplitOptimizer
from lightning_dni.estimators import CriticEstimator, LinearEstimator

SGD = partial(torch.optim.SGD, lr=0.3)
HIDDEN = WIDTHS[1:-1]
SHARE = 0.4


def pair(estimator, **options):
    """An attached engine on a model, and a copy of the model for the twin."""
    torch.manual_seed(0)
    model = mlp(WIDTHS)
    engine = attached(model, BOUNDARIES, estimator, estimator_optimizer=SGD, seed=7, **options)
    return engine, model, copy.deepcopy(model)


def parameters_of(modules):
    return [p for module in modules for p in module.parameters()]


# ---- lambda by boundary, sparse, with estimators that learn


def mixed_step(stages, maps, x, y, lambdas, awake):
    """The gradients of one step, top down; what a stage that sits out would have handed down is missing."""
    taken, made = [x], []
    for stage in stages[:-1]:
        made.append(stage(taken[-1]))
        taken.append(made[-1].detach().requires_grad_())
    arrived = None
    if awake[-1]:
        F.cross_entropy(stages[-1](taken[-1]), y).backward()
        arrived = taken[-1].grad
    for k in reversed(range(len(maps))):
        said, came = maps[k](made[k].detach(), y), arrived
        if came is not None:
            (said - came * len(x)).square().sum(1).mean().backward()
        arrived = None
        if awake[k] and (lambdas[k] == 0.0 or came is not None):
            true = 0.0 if lambdas[k] == 0.0 else lambdas[k] * came
            made[k].backward((1.0 - lambdas[k]) * said.detach() / len(x) + true)
            arrived = taken[k].grad


@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("lambdas", [(0.3, 0.0, 0.7), (0.0, 1.0, 0.0), (0.2, 0.9, 0.4)], ids=str)
def test_estimators_learn_under_another_lambda_at_each_boundary(lambdas, probability):
    by_name = dict(zip(BOUNDARIES, lambdas, strict=True))
    engine, model, twin = pair(
        partial(LinearEstimator, num_classes=CLASSES), bp_lambda=by_name, update_probability=probability
    )
    maps = [LinearMap(width, CLASSES, torch.float64) for width in HIDDEN]
    user, by_hand = SGD(model.parameters()), [SGD(twin.parameters()), SGD(parameters_of(maps))]
    for step in range(14):
        batch = blobs()
        update(engine, model, user, [batch])
        for optimizer in by_hand:
            optimizer.zero_grad()
        mixed_step(twin, maps, *batch, lambdas, awake_in(step, probability))
        for optimizer in by_hand:
            optimizer.step()
    assert_close(weights(model), weights(twin), 1e-10)
    h, y = torch.randn(4, HIDDEN[0], dtype=torch.float64), torch.arange(4) % CLASSES
    (said,), _ = engine.estimators[BOUNDARIES[0]].synthesize((h,), y, None)
    torch.testing.assert_close(said, maps[0](h, y), rtol=0, atol=1e-10)
    assert said.any()


# ---- a critic that is told a share of the labels, with everything that changes when it learns


def told(output, y):
    """What a critic's classes are to be like: the network's, and a share of the labels."""
    return (1.0 - SHARE) * output.softmax(-1) + SHARE * F.one_hot(y, CLASSES).to(output.dtype)


def critic_step(stages, heads, x, y, awake, share):
    """Accumulate the gradients of the stages; returns what every head learns from."""
    seen, h = [], x
    for k, stage in enumerate(stages):
        h = stage(h.detach())
        if k < len(heads):
            seen.append(h.detach().requires_grad_())
        if not awake[k]:
            continue
        if k == len(heads):
            (F.cross_entropy(h, y) * share).backward()
        else:
            value = F.cross_entropy(heads[k](seen[-1]), y)
            h.backward(torch.autograd.grad(value * share, seen[-1])[0])
    return [s.detach() for s in seen], told(h.detach(), y)


@pytest.mark.parametrize("estimator_steps", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("when", ["step", "immediate"])
def test_critics_with_a_share_of_the_labels(when, probability, accumulate, estimator_steps):
    engine, model, twin = pair(
        partial(CriticEstimator, num_classes=CLASSES, label_share=SHARE),
        update=when,
        update_probability=probability,
        estimator_steps=estimator_steps,
    )
    user, by_hand = (torch.optim.Adam(m.parameters(), 1e-2) for m in (model, twin))
    engine.updater = SplitOptimizer(user) if when == "immediate" else None
    heads = [nn.Linear(width, CLASSES, dtype=torch.float64) for width in HIDDEN]
    for parameter in parameters_of(heads):
        nn.init.zeros_(parameter)
    learner = SGD(parameters_of(heads))
    for step in range(12):
        window = [blobs() for _ in range(accumulate)]
        update(engine, model, user, window)
        by_hand.zero_grad()
        awake = awake_in(step * accumulate, probability)
        lessons = [critic_step(twin, heads, x, y, awake, 1 / accumulate) for x, y in window]
        by_hand.step()
        for _ in range(estimator_steps):
            learner.zero_grad()
            for seen, classes in lessons:
                for head, h in zip(heads, seen, strict=True):
                    (F.cross_entropy(head(h), classes) / accumulate).backward()
            learner.step()
    assert_close(weights(model), weights(twin), 1e-10)
    for head, estimator in zip(heads, engine.estimators.values(), strict=True):
        (layer,) = estimator.head.stack.layers
        assert_close(weights(layer), weights(head), 1e-10)
        assert head.weight.any()


# ---- a context at a truncation


def mean_target(y):
    """What the estimators are told of the future of these chunks."""
    return y.mean(0)


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_an_estimator_at_a_truncation_sees_a_context(damping):
    ours, twin, chunks = Net("lstm"), Net("lstm"), draw_chunks(7)
    engine = engine_of(
        ours,
        partial(LinearEstimator, context_size=OUTPUTS),
        labels=lambda batch: mean_target(batch[1]),
        damping=damping,
    )
    with engine:
        found, _ = train(ours, engine, chunks)
    width = width_of(twin)
    matrix, bias = torch.zeros(width, width + OUTPUTS).double(), torch.zeros(width).double()
    expected = train_by_hand(twin, chunks, matrix, bias, damping=damping, context_of=mean_target)
    closely([net for net, _ in found], [list(net) for net, _ in expected])
    closely(list(ours.parameters()), list(twin.parameters()))
    without, blind = Net("lstm"), torch.zeros(width, width).double()
    train_by_hand(without, chunks, blind, bias, damping=damping)
    assert not torch.allclose(next(ours.parameters()), next(without.parameters()), atol=1e-6)
