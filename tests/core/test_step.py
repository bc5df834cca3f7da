"""One step: which forwards count, how losses and estimators accumulate, and that nothing stays."""

import copy
import gc
import weakref
from collections import Counter
from contextlib import suppress

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    VECTOR_ESTIMATORS,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
    weights,
)
from oracles import decoupled_backward
from torch import nn
from torch.nn import functional as F
from torch.utils.weak import TensorWeakRef

from lightning_dni.estimators import LinearEstimator

OURS = {
    "torch",
    "torch.utils.weak",
    *(f"lightning_dni.core.{m}" for m in ("cut", "estimator", "stage", "step")),
}
"""Where what a step makes is defined; on CUDA builds torch itself leaves other things for the collector."""

KINDS = pytest.mark.parametrize("kind", VECTOR_ESTIMATORS)
EVERY_LAMBDA = pytest.mark.parametrize("bp_lambda", LAMBDAS)
WIDTHS = (5, 6, 7, 6, CLASSES)
BOUNDARIES = ["0", "1", "2"]


def three_steps(kind, bp_lambda, forward):
    """Weights of model and estimators after three steps whose loss is `forward(model, x, y)`."""
    torch.manual_seed(4)
    model = mlp(WIDTHS)
    engine = attached(model, BOUNDARIES, VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        x, y = blobs()
        optimizer.zero_grad()
        with engine.training_step((x, y)):
            loss = forward(model, x, y)
        engine.backward(loss)
        optimizer.step()
        engine.update_estimators()
    learnt = {f"{n}.{k}": p.detach() for n, e in engine.estimators.items() for k, p in e.named_parameters()}
    return {**learnt, **weights(model)}


@KINDS
@EVERY_LAMBDA
def test_labels_that_are_changed_in_place_after_the_forward_pass_are_those_that_were_seen(kind, bp_lambda):
    """As where padding is masked just before the loss."""

    def masked(out, y, in_place):
        hidden = y if in_place else y.clone()
        hidden[::3] = -100
        return F.cross_entropy(out, hidden)

    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model, batch = mlp(), blobs()
        options = {"estimator_steps": 2, "bp_lambda": bp_lambda, "seed": 0}
        engine = attached(model, ["0", "1"], VECTOR_ESTIMATORS[kind], **options)
        for _ in range(3):
            x, y = (each.clone() for each in batch)
            run_step(engine, model, (x, y), lambda out, y, in_place=in_place: masked(out, y, in_place))
            engine.update_estimators()
        found.append({f"{n}.{k}": v for n, e in engine.estimators.items() for k, v in weights(e).items()})
    assert same_bits(*found)


def once(model, x, y):
    return F.cross_entropy(model(x), y)


def then_dropped(model, x, y):
    loss = once(model, x, y)
    model(x + 1)
    return loss


def dropped_first(model, x, y):
    model(x + 1)
    return once(model, x, y)


def detached_beside(model, x, y):
    return once(model, x, y) + model(x + 1).detach().mean()


def without_grad(model, x, y):
    with torch.no_grad():
        model(x + 1)
    return once(model, x, y)


@pytest.mark.parametrize("forward", [then_dropped, dropped_first, detached_beside, without_grad])
@EVERY_LAMBDA
@KINDS
def test_a_forward_that_never_reaches_the_loss_never_was(kind, bp_lambda, forward):
    assert same_bits(three_steps(kind, bp_lambda, once), three_steps(kind, bp_lambda, forward))


@EVERY_LAMBDA
def test_two_forwards_of_one_loss_add_up(bp_lambda):
    model, (x, y) = mlp(WIDTHS), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, BOUNDARIES, bp_lambda=bp_lambda)
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(-x), y)
    engine.backward(loss)
    for z in (x, -x):
        decoupled_backward(twin, z, lambda out: F.cross_entropy(out, y), [torch.sin] * 3, [bp_lambda] * 3)
    assert_close(grads(model), grads(twin), atol=1e-14)


@KINDS
def test_two_forwards_of_one_loss_teach_twice(kind):
    """What an estimator learns from two forwards is the sum of what it learns from each."""
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0", "1"], VECTOR_ESTIMATORS[kind])
    run_step(engine, model, (x, y))
    engine.drop_estimator_gradients()
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(-x), y)
    engine.backward(loss)
    together = {n: grads(e) for n, e in engine.estimators.items()}
    engine.drop_estimator_gradients()
    for z in (x, -x):
        run_step(engine, model, (z, y))
    for n, e in engine.estimators.items():
        assert_close(together[n], grads(e), atol=1e-14)


@pytest.mark.parametrize("n", [4])
@EVERY_LAMBDA
@KINDS
def test_accumulation_is_the_mean(kind, bp_lambda, n):
    model, batches = mlp(WIDTHS), [blobs() for _ in range(n)]
    engine = attached(model, BOUNDARIES, VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
    for batch in batches:
        run_step(engine, model, batch, lambda out, y: F.cross_entropy(out, y) / n, accumulate=n)
    accumulated = {"": grads(model), **{k: grads(e) for k, e in engine.estimators.items()}}
    sums = {}
    for batch in batches:
        model.zero_grad(), engine.drop_estimator_gradients()
        run_step(engine, model, batch)
        for k, m in {"": model, **engine.estimators}.items():
            sums.setdefault(k, {})
            for name, g in grads(m).items():
                sums[k].setdefault(name, [])
                sums[k][name] += [] if g is None else [g / n]
    for k in accumulated:
        assert_close(accumulated[k], {i: sum(g) if g else None for i, g in sums[k].items()}, atol=1e-14)


@EVERY_LAMBDA
@KINDS
def test_a_gradient_scaler_scales_the_weights_gradients_only(kind, bp_lambda):
    model, batch = mlp(WIDTHS), blobs()
    twin = copy.deepcopy(model)
    scaled = attached(model, BOUNDARIES, VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
    plain = attached(twin, BOUNDARIES, VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
    scale = torch.tensor(2.0**10)
    for _ in range(2):
        model.zero_grad(), twin.zero_grad()
        run_step(scaled, model, batch, lambda out, y: F.cross_entropy(out, y) * scale, scale=scale)
        run_step(plain, twin, batch)
        for n in scaled.estimators:
            assert_close(grads(scaled.estimators[n]), grads(plain.estimators[n]), atol=1e-14)
        ours = {n: None if g is None else g / scale for n, g in grads(model).items()}
        assert_close(ours, grads(twin), atol=1e-14)
        scaled.update_estimators(), plain.update_estimators()


def test_gradients_of_the_users_own_are_added_to():
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    run_step(attached(model, ["0", "1"], bp_lambda=0.5), model, batch)
    run_step(attached(twin, ["0", "1"], bp_lambda=0.5), twin, batch)
    assert_close(grads(model), {n: g + 1 for n, g in grads(twin).items()}, atol=1e-15)


@EVERY_LAMBDA
def test_zero_grad_between_forward_and_backward_wipes_nothing(bp_lambda):
    model, (x, y) = mlp(), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, ["0", "1"], bp_lambda=bp_lambda)
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model(x), y)
    model.zero_grad()
    engine.backward(loss)
    run_step(attached(twin, ["0", "1"], bp_lambda=bp_lambda), twin, (x, y))
    assert same_bits(grads(model), grads(twin))


@EVERY_LAMBDA
@KINDS
def test_a_step_without_backward_leaves_the_next_one_clean(kind, bp_lambda):
    ends = []
    for interrupted in (False, True):
        torch.manual_seed(4)
        model, batch = mlp(WIDTHS), blobs()
        engine = attached(model, BOUNDARIES, VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
        run_step(engine, model, batch)
        if interrupted:
            with engine.training_step(batch):
                model(batch[0] + 1)
            engine.update_estimators()
        else:
            engine.update_estimators()
        run_step(engine, model, batch)
        ends.append(
            {
                **grads(model),
                **{f"{n}.{k}": g for n, e in engine.estimators.items() for k, g in grads(e).items()},
            }
        )
    assert same_bits(*ends)


@EVERY_LAMBDA
def test_an_exception_in_a_step_leaves_the_next_one_clean(bp_lambda):
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, ["0", "1"], bp_lambda=bp_lambda)
    with suppress(KeyError), engine.training_step(batch):
        model(batch[0])
        raise KeyError
    run_step(engine, model, batch)
    run_step(attached(twin, ["0", "1"], bp_lambda=bp_lambda), twin, batch)
    assert same_bits(grads(model), grads(twin))


def test_validation_outside_a_step_is_not_cut():
    model, (x, y) = mlp(), blobs()
    attached(model, ["0", "1"])
    F.cross_entropy(model(x), y).backward()
    ours = grads(model)
    model.zero_grad()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    assert same_bits(ours, grads(twin))


class Adversary(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = mlp((5, 6, 5)), mlp((5, 6, 1))


@EVERY_LAMBDA
def test_a_detached_generator_learns_nothing(bp_lambda):
    model, (x, _) = Adversary(), blobs()
    engine = attached(model, ["generator.0", "critic.0"], LinearEstimator, bp_lambda=bp_lambda)
    with engine.training_step((x, None)):
        loss = model.critic(model.generator(x).detach()).mean()
    engine.backward(loss)
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is None for p in engine.estimators["generator.0"].parameters())
    assert model.critic[1].weight.grad is not None


@pytest.mark.parametrize("estimator_steps", [1, 2])
@EVERY_LAMBDA
@KINDS
def test_no_activation_outlives_its_step(kind, bp_lambda, estimator_steps):
    model, seen, alive = mlp(WIDTHS), [], {}
    for stage in model:
        stage.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    options = {"bp_lambda": bp_lambda, "estimator_steps": estimator_steps}
    engine = attached(model, BOUNDARIES, VECTOR_ESTIMATORS[kind], **options)
    gc.collect()
    gc.freeze()  # what other tests have left is not counted
    gc.disable()
    try:
        for k in range(8):
            run_step(engine, model, blobs())
            engine.update_estimators()
            assert all(ref() is None for ref in seen)
            if k in (1, 7):
                alive[k] = Counter(type(o) for o in gc.get_objects() if type(o).__module__ in OURS)
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # as it was
    # of a boundary tensor that is gone, a later one may have the place in memory, and the reference
    assert max(counted.pop(TensorWeakRef, 0) for counted in alive.values()) <= len(BOUNDARIES)
    assert not alive[7] - alive[1]
