"""Estimators are built where they are needed, taught as often as asked, and restored as they were."""

import copy
from functools import partial

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    VECTOR_ESTIMATORS,
    Told,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
    weights,
)
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import (
    ConvEstimator,
    LinearEstimator,
    LocalLossEstimator,
    MLPEstimator,
    ZeroEstimator,
)

LINEAR = partial(LinearEstimator, num_classes=CLASSES)
SGD = partial(torch.optim.SGD, lr=0.1)


def test_every_pattern_has_its_kind():
    model = mlp((5, 6, 7, 6, CLASSES))
    kinds = {"0": ZeroEstimator, "[12]": LINEAR}
    engine = attached(model, ["0", "1", "2"], kinds)
    assert engine.estimators == {}
    run_step(engine, model, blobs())
    assert [type(e) for e in engine.estimators.values()] == [ZeroEstimator, LinearEstimator, LinearEstimator]


def test_a_boundary_without_a_kind_is_refused():
    with pytest.raises(BoundaryError, match="pattern in `estimator` to match boundary '1'"):
        DNIEngine(mlp(), ["0", "1"], {"0": Told})


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(
        EstimatorError, match=f"`estimator_steps` to be an integer of at least 1, but got {steps!r}"
    ):
        DNIEngine(mlp(), ["0"], Told, estimator_steps=steps)


def hand_written(maps, optimizer, lessons, steps):
    """`steps` steps of least squares of every map on its lessons (h, y, target)."""
    for _ in range(steps):
        optimizer.zero_grad()
        for batch in lessons:
            for predict, (h, y, target) in zip(maps, batch, strict=True):
                x = torch.cat([h, F.one_hot(y, CLASSES).to(h)], 1)
                (((predict(x) - target) ** 2).sum(1).mean() / len(lessons)).backward()
        optimizer.step()


def lesson(model, maps, x, y):
    """What the boundaries of a three-stage net are told at lambda 0."""
    h0 = model[0](x).detach().requires_grad_()
    out1 = model[1](h0)
    h1 = out1.detach().requires_grad_()
    F.cross_entropy(model[2](h1), y, reduction="sum").backward()
    given = maps[1](torch.cat([h1.detach(), F.one_hot(y, CLASSES).to(x)], 1)).detach()
    out1.backward(given)
    return [(h0.detach(), y, h0.grad), (h1.detach(), y, h1.grad)]


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, lr=1e-2)])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_estimator_steps_are_those_of_a_hand_written_loop(steps, accumulate, optimizer):
    """Also where the loader writes the labels of every batch into the same tensor."""
    model, labels = mlp(), blobs()[1]
    engine = attached(model, ["0", "1"], LINEAR, estimator_steps=steps, estimator_optimizer=optimizer)
    maps = [nn.Linear(w + CLASSES, w).double() for w in (6, 7)]
    for p in (p for m in maps for p in m.parameters()):
        nn.init.zeros_(p)
    theirs = optimizer([p for m in maps for p in m.parameters()])
    for _ in range(4):
        batches = [blobs() for _ in range(accumulate)]
        lessons = [lesson(copy.deepcopy(model), maps, *batch) for batch in batches]
        for x, y in batches:
            run_step(
                engine,
                model,
                (x, labels.copy_(y)),
                lambda out, y: F.cross_entropy(out, y) / accumulate,
                accumulate=accumulate,
            )
        engine.update_estimators()
        hand_written(maps, theirs, lessons, steps)
    for estimator, m in zip(engine.estimators.values(), maps, strict=True):
        ours = torch.cat([estimator.map.weight, estimator.conditioning.weight.T], 1)
        torch.testing.assert_close(ours, m.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(estimator.map.bias, m.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", VECTOR_ESTIMATORS)
def test_further_steps_change_no_gradient_of_this_step(kind):
    found = []
    for steps in (1, 4):
        torch.manual_seed(0)
        model, batch = mlp(), blobs()
        engine = attached(model, ["0", "1"], VECTOR_ESTIMATORS[kind], estimator_steps=steps)
        run_step(engine, model, batch)
        learnt = {f"{n}.{k}": g for n, e in engine.estimators.items() for k, g in grads(e).items()}
        found.append({**grads(model), **learnt})
    assert_close(*found, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_skipped_step_teaches_nothing(steps):
    model = mlp()
    engine = attached(model, ["0", "1"], LINEAR, estimator_steps=steps)
    run_step(engine, model, blobs())
    engine.drop_estimator_gradients()
    before = {n: weights(e) for n, e in engine.estimators.items()}
    engine.update_estimators()
    assert all(same_bits(before[n], weights(e)) for n, e in engine.estimators.items())


def saved_state(estimator=LINEAR, boundaries=("0", "1")):
    model = mlp()
    engine = attached(model, list(boundaries), estimator)
    run_step(engine, model, blobs())
    engine.update_estimators()
    return copy.deepcopy(engine.state_dict())


def test_estimators_are_built_from_saved_state():
    state = saved_state()
    engine = DNIEngine(mlp(), ["0", "1"], LINEAR)
    engine.load_state_dict(state)
    assert all(same_bits(weights(e), state["estimators"][n]) for n, e in engine.estimators.items())


def test_a_state_of_other_boundaries_is_refused():
    with pytest.raises(
        BoundaryError,
        match=r"boundaries \['0'\], but got that of \['0', '1'\].*`boundaries` of the saved run",
    ):
        DNIEngine(mlp(), ["0"], LINEAR).load_state_dict(saved_state())


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (LinearEstimator, "one that does not fit"),
        (partial(MLPEstimator, hidden_sizes=(4,)), "that of a LinearEstimator"),
        (partial(LocalLossEstimator, num_classes=3), "that of a LinearEstimator"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(other, what):
    engine = DNIEngine(mlp(), ["0", "1"], other)
    with pytest.raises(EstimatorError, match=rf"(?s)at boundary '0', but got {what}.*`estimator` of the"):
        engine.load_state_dict(saved_state())


def test_a_state_of_another_width_is_refused():
    model, state = mlp((5, 9, 9, CLASSES)), saved_state()
    engine = attached(model, ["0", "1"], LINEAR)
    run_step(engine, model, blobs())
    with pytest.raises(EstimatorError, match=r"\(9,\)\] at boundary '0', but got one for \[\(6,\)\]"):
        engine.load_state_dict(state)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_lambda_is_part_of_the_state(bp_lambda):
    model = mlp()
    state = DNIEngine(model, ["0", "1"], LINEAR, bp_lambda={"0": bp_lambda, "1": 0.25}).state_dict()
    engine = DNIEngine(model, ["0", "1"], LINEAR)
    engine.load_state_dict(state)
    assert engine.bp_lambda == {"0": bp_lambda, "1": 0.25}


def test_describe_tells_who_learns_from_the_network():
    model = mlp()
    kinds = {"0": VECTOR_ESTIMATORS["local_loss"], "1": VECTOR_ESTIMATORS["critic"]}
    engine = attached(model, ["0", "1"], kinds, estimator_optimizer=SGD)
    run_step(engine, model, blobs())
    facts = engine.describe()
    assert facts["estimators"] == {"0": "LocalLossEstimator", "1": "CriticEstimator"}
    assert facts["learns_from_network"] == {"0": False, "1": True}
    assert facts["estimator_parameters"] == {"0": 6 * 8 + 8 + 8 * 3 + 3, "1": 7 * 8 + 8 + 8 * 3 + 3}
    assert facts["estimator_optimizers"] == [{"name": "SGD", "lr": 0.1}]


def test_a_saved_seed_is_used_for_estimators_that_are_yet_to_be_built():
    model, batch = mlp(), blobs()
    first = DNIEngine(model, ["0"], partial(MLPEstimator, hidden_sizes=(8,)), seed=1)
    second = DNIEngine(model, ["0"], partial(MLPEstimator, hidden_sizes=(8,)), seed=2)
    second.load_state_dict(first.state_dict())
    for engine in (first, second):
        with engine:
            run_step(engine, model, batch)
    assert same_bits(weights(first.estimators["0"]), weights(second.estimators["0"]))


def test_a_state_without_one_of_the_boundaries_is_refused_for_that():
    """Resuming with a boundary more complained about a pattern in `bp_lambda`."""
    model, batch = mlp(), blobs()
    saved = DNIEngine(model, ["0"], LINEAR)
    with saved:
        run_step(saved, model, batch)
    with pytest.raises(BoundaryError, match="`boundaries`"):
        DNIEngine(model, ["0", "1"], LINEAR).load_state_dict(saved.state_dict())


def _trained_in_order(names):
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(4, 4, dtype=torch.float64) for n in "ab"})
    engine = DNIEngine(model, ["a", "b"], LinearEstimator)
    x = torch.randn(8, 4, dtype=torch.float64)
    with engine:
        for _ in range(2):
            with engine.training_step((x, None)):
                loss = sum((i + 1) * model[n](x).square().sum() for i, n in enumerate(names))
            engine.backward(loss)
            engine.update_estimators()
    return engine


def test_optimizer_state_follows_its_boundary_not_its_place():
    """An engine that had built its estimators in another order loaded each other's moments."""
    saved, other = _trained_in_order("ab"), _trained_in_order("ba")
    other.load_state_dict(saved.state_dict())

    def moments(engine):
        (optimizer,) = engine._pool.optimizers
        return {
            n: optimizer.state[engine.estimators[n].map.weight]["exp_avg"].clone()
            for n in sorted(engine.estimators)
        }

    assert same_bits(moments(saved), moments(other))


def test_a_state_with_fewer_estimators_starts_the_others_afresh():
    """torch refused the optimizer's state; the learning rate finder restores such a one."""
    model, batch = mlp(), blobs()
    engine = DNIEngine(model, ["0", "1"], LINEAR)
    start = engine.state_dict()
    with engine:
        run_step(engine, model, batch)
        engine.update_estimators()
        engine.load_state_dict(start)
        assert engine.estimators == {}
        run_step(engine, model, batch)
    assert not any(p.any() for e in engine.estimators.values() for p in e.parameters())


def test_a_state_of_other_channels_is_refused():
    """Only the number of dimensions was compared, so the first convolution failed instead."""

    def net(channels):
        return nn.Sequential(
            nn.Conv2d(2, channels, 3, padding=1), nn.Flatten(), nn.LazyLinear(CLASSES)
        ).double()

    batch = (torch.randn(4, 2, 6, 6).double(), torch.randint(0, CLASSES, (4,)))
    make = partial(ConvEstimator, hidden_channels=(4,), kernel_size=3)
    model, other = net(3), net(5)
    saved, resumed = attached(model, ["0"], make), attached(other, ["0"], make)
    run_step(saved, model, batch)
    resumed.load_state_dict(saved.state_dict())
    with pytest.raises(EstimatorError, match="boundary '0'"):
        run_step(resumed, other, batch)
