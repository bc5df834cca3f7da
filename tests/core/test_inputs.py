"""Synthetic inputs: each stage runs and learns by itself, as written out by hand."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from core.nets import CLASSES, assert_close, attached, grads, run_step, same_bits, update, weights
from core.predicted import (
    FEATURES,
    HIDDEN,
    LINEAR,
    NAMES,
    SMALL,
    WIDTHS,
    adam,
    batches,
    engine_of,
    inputs_of,
    net,
    sgd,
    trained,
)
from core.test_sparse import awake_in
from torch import nn
from torch.nn import functional as F
from unlocked import Predictor, UnlockedDNI

from lightning_dni.callbacks.window import BoundaryWindow
from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.estimators import CriticEstimator, LinearEstimator, LocalLossEstimator


class Made:
    """Input estimators with the weights of given predictors; none where there is none."""

    def __init__(self, predictors):
        self.predictors = dict(zip(NAMES, predictors, strict=True))

    def factories(self):
        return {name: None if p is None else partial(self.build, p) for name, p in self.predictors.items()}

    def build(self, predictor, spec):
        made = SMALL(spec).to(predictor.last.weight.dtype)
        first, last = made.stack.layers
        first.load_state_dict(predictor.hidden.state_dict())
        last.load_state_dict(predictor.last.state_dict())
        return made


def predictors(model, without=()):
    torch.manual_seed(3)
    dtype = model[-1].weight.dtype
    return [
        None if name in without else Predictor(FEATURES, HIDDEN, width, dtype)
        for name, width in zip(NAMES, WIDTHS, strict=True)
    ]


# ---- the oracle


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "without", "probability"),
    [
        (sgd, 1, (), 1.0),
        (adam, 1, (), 1.0),
        (sgd, 3, (), 1.0),
        (sgd, 1, ("1",), 1.0),
        (sgd, 1, (), 0.5),
    ],
    ids=["sgd", "adam", "accumulated", "one real input", "sparse"],
)
def test_it_is_the_unlock_by_hand(optimizer, accumulate, without, probability):
    model = net()
    made = predictors(model, without)
    engine = engine_of(
        model,
        Made(copy.deepcopy(made)).factories(),
        input_optimizer=optimizer,
        update_probability=probability,
    )
    twin = UnlockedDNI(copy.deepcopy(model), WIDTHS, CLASSES, made)
    user = optimizer(model.parameters())
    steppers = [optimizer(twin.stages.parameters())]
    steppers += [sgd(m.parameters()) for m in twin.maps]
    steppers += [optimizer(p.parameters()) for p in made if p is not None]
    data = batches(12 * accumulate)
    for step in range(12):
        window = data[step * accumulate : (step + 1) * accumulate]
        losses = update(engine, model, user, window)
        for each in steppers:
            each.zero_grad()
        awake = awake_in(step, probability)
        found = [twin.gradients(x, y, F.cross_entropy, 1 / accumulate, awake) for x, y in window]
        for each in steppers:
            each.step()
        torch.testing.assert_close(torch.stack(losses), torch.stack(found), rtol=0, atol=1e-10)
    assert_close(weights(model), weights(twin.stages), 1e-10)
    for name, estimator in engine.estimators.items():
        h, y = torch.randn(4, WIDTHS[int(name)], dtype=torch.float64), torch.arange(4) % CLASSES
        (said,), _ = estimator.synthesize((h,), y, None)
        torch.testing.assert_close(said, twin.maps[int(name)](h, y), rtol=0, atol=1e-10)
        assert said.any()
    for name, estimator in engine.input_estimators.items():
        hand = made[int(name)]
        for layer, expected in zip(estimator.stack.layers, (hand.hidden, hand.last), strict=True):
            assert_close(dict(layer.state_dict()), dict(expected.state_dict()), 1e-10)
    assert set(engine.input_estimators) == set(NAMES) - set(without)


def test_immediate_updates_change_no_bit():
    data, runs = batches(10, torch.float32), []
    for when in ("step", "immediate"):
        model = net(torch.float32)
        engine, losses = trained(model, data, update=when)
        runs.append({**weights(model), "losses": torch.stack(losses), **inputs_of(engine)})
    assert same_bits(*runs)


# ---- what reaches what


def test_no_stage_hears_of_another():
    """Other weights above, and another loss: not a bit differs below, nor of what predicts inputs."""
    data, found = batches(1), []
    for loss_of in (F.cross_entropy, lambda scores, y: scores.square().sum()):
        model = net()
        engine = engine_of(model)
        user = sgd(model.parameters())
        for batch in batches(4):
            update(engine, model, user, [batch])
        if found:
            nn.init.normal_(model[2][0].weight)
            nn.init.normal_(model[3].weight)
        engine.drop_estimator_gradients()
        model.zero_grad()
        run_step(engine, model, data[0], loss_of)
        below = {n: g for n, g in grads(model).items() if n.startswith(("0", "1"))}
        found.append({**below, **{n: grads(e) for n, e in engine.input_estimators.items() if n != "2"}["0"]})
        found[-1] |= {f"input 1 {n}": g for n, g in grads(engine.input_estimators["1"]).items()}
    assert same_bits(*found)
    assert all(g is not None and bool(g.any()) for g in found[0].values())


def test_the_loss_is_that_of_the_predicted_input():
    model, ((x, y),) = net(batch_norm=False), batches(1)
    engine = engine_of(model)
    loss = run_step(engine, model, (x, y))
    zero = model[3](torch.zeros(len(x), WIDTHS[-1], dtype=torch.float64))  # estimators start at zero
    torch.testing.assert_close(loss, F.cross_entropy(zero, y).detach())
    plain = model(x)
    engine.detach()
    assert torch.equal(plain, model(x))  # outside of a training step nothing is predicted


@pytest.mark.parametrize(
    "estimator",
    [
        partial(LocalLossEstimator, num_classes=CLASSES),
        partial(CriticEstimator, num_classes=CLASSES),
        LinearEstimator,
    ],
    ids=["local loss", "critic", "no labels"],
)
def test_other_estimators_learn_beside_it(estimator):
    model = net()
    before = weights(model)
    engine, losses = trained(model, batches(6), estimator=estimator)
    assert all(loss.isfinite() for loss in losses)
    assert not any(torch.equal(before[n], value) for n, value in weights(model).items() if "running" not in n)
    assert all(bool(p.any()) for e in engine.estimators.values() for p in e.parameters())


def test_the_global_generator_is_not_drawn_from():
    model, data = net(), batches(3)
    before = torch.get_rng_state()
    trained(model, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forward_pass_that_does_not_count_teaches_nothing():
    model, ((x, y),) = net(), batches(1)
    engine = engine_of(model)
    with engine.training_step((x, y)):
        model(x)
        loss = model[3].weight.sum()
    engine.backward(loss)
    assert all(g is None for e in engine.input_estimators.values() for g in grads(e).values())


def test_nothing_outlives_the_step():
    model, held = net(), []
    model[1].register_forward_hook(lambda m, a, out: held.extend(map(weakref.ref, (a[0], out))), prepend=True)
    trained(model, batches(3))
    gc.collect()
    assert [ref for ref in held if ref() is not None] == []


def test_reports_say_how_far_the_inputs_are_off():
    model, data, real, seen = net(), batches(8), {}, {}
    for name in NAMES:
        model[int(name)].register_forward_hook(
            lambda m, a, out, n=name: real.update({n: out.detach()}), prepend=True
        )
    for name, k in zip(NAMES, (1, 2, 3), strict=True):
        model[k].register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0].detach()}))
    engine = engine_of(model)
    user = sgd(model.parameters())
    for batch in data:
        engine.request_report()
        update(engine, model, user, [batch])
        for name, report in engine.last_report.boundaries.items():
            window = BoundaryWindow()
            window.update(report)
            expected = (seen[name] - real[name]).norm() / real[name].norm().clamp(min=1e-300)
            measured = window.compute()
            torch.testing.assert_close(measured["dni_input_error"], expected)
            assert not measured["dni_input_error"].requires_grad
            assert "dni_true_gradient_cosine" not in measured
    assert 0.0 < measured["dni_input_error"] < 1.0
    plain = attached(net(), NAMES, LINEAR)
    plain.request_report()
    run_step(plain, plain._model, data[0])
    window = BoundaryWindow()
    window.update(plain.last_report.boundaries["0"])
    assert "dni_input_error" not in window.compute()


# ---- state


def test_a_resumed_run_is_the_run_bit_for_bit():
    data = batches(10, torch.float32)
    whole = net(torch.float32)
    engine, user = engine_of(whole, input_optimizer=adam), adam(whole.parameters())
    for batch in data[:5]:
        update(engine, whole, user, [batch])
    saved = copy.deepcopy({"model": weights(whole), "user": user.state_dict(), "engine": engine.state_dict()})
    for batch in data[5:]:
        update(engine, whole, user, [batch])
    other = net(torch.float32)
    other.load_state_dict(saved["model"])
    again, user = engine_of(other, input_optimizer=adam), adam(other.parameters())
    user.load_state_dict(saved["user"])
    again.load_state_dict(saved["engine"])
    for batch in data[5:]:
        update(again, other, user, [batch])
    assert same_bits({**weights(other), **inputs_of(again)}, {**weights(whole), **inputs_of(engine)})


def test_several_tensors_and_maps_are_predicted_in_their_form():
    shapes = [(4,), (3, 2, 2)]
    leaves = tuple(LeafSpec(shape, torch.float32) for shape in shapes)
    spec = BoundarySpec("0", leaves, input=LeafSpec((1, 3, 3), torch.float32))
    predicted = SMALL(spec).predict(torch.randn(5, 1, 3, 3))
    assert [tuple(p.shape[1:]) for p in predicted] == shapes
    assert not any(bool(p.any()) for p in predicted)
    assert BoundarySpec.from_state_dict(spec.state_dict(), spec.device) == spec
