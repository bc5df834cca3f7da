"""Gradients that are given some steps late: an asynchronous pipeline with stashed weights, to the bit."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from core.nets import (
    CLASSES,
    Told,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
    unchecked,
    update,
    weights,
)
from stashing import StashingStages
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import BoundarySpec, DNIEngine, LeafSpec, SplitOptimizer
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators import (
    BackpropEstimator,
    DelayedGradientEstimator,
    FeedbackAlignmentEstimator,
    LinearEstimator,
)

OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=1e-2),
}
WIDTHS = (5, 6, 7, 6, CLASSES)


def delayed(*delays):
    """Estimators of boundaries "0", "1", ... by delay; None for one that gives sin(h)."""
    return {
        str(k): Told if delay is None else partial(DelayedGradientEstimator, delay=delay)
        for k, delay in enumerate(delays)
    }


def net(boundaries=3, dtype=torch.float64, dropout=0.2):
    torch.manual_seed(0)
    return mlp(WIDTHS[-boundaries - 2 :], dropout, batch_norm=True, dtype=dtype)


def windows(steps=14, accumulate=1, features=5, dtype=torch.float64):
    """Batches by optimizer step; every fourth is short, and so is the last window."""
    torch.manual_seed(1)
    data = [[blobs(8 if s % 4 else 3, features, dtype) for _ in range(accumulate)] for s in range(steps)]
    return [*data[:-1], data[-1][:1]]


def trained(model, estimators, data, optimizer="momentum", before=lambda engine, step: None, **options):
    """Train `model`; returns its engine and the losses."""
    engine = DNIEngine(model, list(estimators), estimators, **options)
    user, losses = OPTIMIZERS[optimizer](model.parameters()), []
    engine.updater = SplitOptimizer(user) if options.get("update") == "immediate" else None
    torch.manual_seed(2)
    with engine:
        for step, batches in enumerate(data):
            before(engine, step)
            losses += update(engine, model, user, batches)
    return engine, losses


def by_hand(model, delays, data, optimizer="momentum"):
    twin = StashingStages(model, delays)
    user, losses = OPTIMIZERS[optimizer](model.parameters()), []
    torch.manual_seed(2)
    for batches in data:
        user.zero_grad()
        losses += twin.step(batches, F.cross_entropy)
        user.step()
    return losses


# ---- the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("delays", "optimizer", "accumulate"),
    [
        ((1, 1), "momentum", 1),
        ((1, 1, 1), "adam", 1),
        ((2, 2, 2), "momentum", 3),
        ((4, 4), "adam", 1),
        ((1, 0, 2), "adam", 2),
        ((3, None), "momentum", 1),
        ((1, None, 2), "adam", 2),
    ],
    ids=str,
)
def test_it_is_a_pipeline_that_stashes_weights_bit_for_bit(delays, optimizer, accumulate, dtype):
    model = net(len(delays), dtype)
    twin, before = copy.deepcopy(model), weights(model)
    data = windows(accumulate=accumulate, features=model[0][0].in_features, dtype=dtype)
    engine, losses = trained(model, delayed(*delays), data, optimizer)
    expected = by_hand(twin, delays, data, optimizer)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert same_bits(weights(model), weights(twin))
    assert engine.describe()["delays"] == {str(k): d for k, d in enumerate(delays) if d}
    assert not any(torch.equal(before[n], value) for n, value in weights(model).items())


def test_without_a_delay_it_is_backprop():
    runs = []
    for estimators in (delayed(0, 0), dict.fromkeys("01", BackpropEstimator)):
        model = net(2, torch.float32)
        trained(model, estimators, windows(features=6, dtype=torch.float32))
        runs.append(weights(model))
    assert same_bits(*runs)


def test_what_waits_for_a_delayed_gradient_is_as_old():
    """A boundary that waits without a delay of its own (backprop, or a lambda above 0) gives the age on."""
    waiting = {"0": BackpropEstimator, "1": partial(DelayedGradientEstimator, delay=2)}
    model = net(2)
    twin, data = copy.deepcopy(model), windows(features=6)
    trained(model, waiting, data)
    by_hand(twin, (0, 2), data)
    assert same_bits(weights(model), weights(twin))
    mixed = net(2)
    trained(mixed, {**waiting, "0": LinearEstimator}, data, bp_lambda={"0": 1.0, "1": 0.0})
    assert same_bits(weights(mixed), weights(twin))


def test_weights_of_two_stages_are_given_each_part_at_its_age():
    def tied():
        torch.manual_seed(0)
        first, last = nn.Linear(6, 6), nn.Linear(6, 6)
        last.weight = first.weight
        return nn.Sequential(nn.Sequential(first, nn.Tanh()), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), last)

    model, twin = tied().double(), tied().double()
    data = windows(features=6)
    trained(model, delayed(1, 2), data)
    by_hand(twin, (1, 2), data)
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-10)


# ---- the first steps, and what is not delayed


def test_in_the_first_steps_a_stage_has_no_gradient():
    model, seen = net(3), []
    engine = attached(model, list("012"), delayed(1, 1, 1))
    user = torch.optim.Adam(model.parameters())
    for batches in windows(5):
        update(engine, model, user, batches)
        seen.append([all(g is None for g in grads(stage).values()) for stage in model])
    assert seen[0] == [True, True, True, False]
    assert seen[1] == [True, True, False, False]
    assert seen[2] == [True, False, False, False]
    assert seen[3] == seen[4] == [False] * 4


def test_what_is_no_parameter_of_the_model_is_given_its_gradient_at_once():
    model, (x, y) = net(2, dropout=0.0), blobs(features=6)
    engine, x = attached(model, ["0", "1"], delayed(1, 1)), x.requires_grad_()
    run_step(engine, model, (x, y))
    given, x.grad = x.grad, None
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(given, x.grad, rtol=0, atol=1e-12)


def test_what_was_frozen_on_the_way_is_not_updated():
    model, data = net(2), windows(4, features=6)
    engine, user = attached(model, ["0", "1"], delayed(1, 1)), torch.optim.SGD(model.parameters(), 0.1)
    for batches in data[:2]:
        update(engine, model, user, batches)
    model[1].requires_grad_(False)
    before = weights(model[1])
    update(engine, model, user, data[2])
    assert all(g is None for g in grads(model[1]).values())
    for name, _ in model[1].named_parameters():
        assert torch.equal(weights(model[1])[name], before[name])
    assert model[0][0].weight.grad is not None


def test_a_forward_pass_that_does_not_count_leaves_nothing_under_way():
    model, twin = net(2, dropout=0.0), net(2, dropout=0.0)
    engine = attached(model, ["0", "1"], delayed(1, 1))
    user = torch.optim.SGD(model.parameters(), 0.1)
    other, data = blobs(features=6), windows(6, features=6)
    for module in (model, twin):
        module.apply(lambda m: setattr(m, "track_running_stats", False))
    for ((x, y),) in data:
        user.zero_grad()
        with engine.training_step((x, y)):
            model(other[0])
            loss = F.cross_entropy(model(x), y)
        engine.backward(loss)
        user.step()
        engine.update_estimators()
    engine.detach()
    plain = StashingStages(twin, (1, 1))
    user = torch.optim.SGD(twin.parameters(), 0.1)
    for batches in data:
        user.zero_grad()
        plain.step(batches, F.cross_entropy)
        user.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_what_is_not_finite_is_left_out():
    """Of its own batch, one and two steps later; then all goes on."""
    model = net(2)
    engine = attached(model, ["0", "1"], delayed(1, 1), on_nonfinite="skip")
    user, lost = torch.optim.SGD(model.parameters(), 0.0), []
    hook = None
    for step, batches in enumerate(windows(5, features=6)):
        if step == 1:  # the gradient that comes back to boundary 1, of this batch
            hook = model[2].register_full_backward_hook(lambda m, i, o: tuple(g * float("inf") for g in i))
        update(engine, model, user, batches)
        if hook is not None:
            hook.remove()
        lost.append([all(g is None for g in grads(stage).values()) for stage in model[:2]])
    assert lost == [[True, True], [True, False], [False, True], [True, False], [False, False]]
    assert all(t.isfinite().all() for t in weights(model).values())


# ---- other options


@pytest.mark.parametrize("option", ["immediate", "probes"])
def test_neither_immediate_updates_nor_probes_change_a_bit(option):
    data, runs = windows(8, features=6), []
    for there in (False, True):
        model = net(2)
        options = {"update": "immediate"} if there and option == "immediate" else {}
        probes = there and option == "probes"
        trained(model, delayed(1, 1), data, before=lambda e, s, p=probes: p and e.request_probe(), **options)
        runs.append(weights(model))
    assert same_bits(*runs)


def test_reports_show_the_weights_gradients_as_they_were_applied():
    """They were the true ones when they were taken; the target is that of the batch it belongs to."""
    reports, model = [], net(2, dropout=0.0)
    engine = attached(model, ["0", "1"], delayed(1, 2))
    user = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for batches in windows(7, features=6):
        engine.request_probe()
        update(engine, model, user, batches)
        reports.append(engine.last_report.boundaries)
    for name, age in (("1", 2), ("0", 3)):
        assert [bool(r[name].applied_weights) for r in reports] == [False] * age + [True] * (7 - age)
        for now, then in zip(reports[age:], reports, strict=False):
            torch.testing.assert_close(
                dict(now[name].applied_weights), dict(then[name].true_weights), rtol=0, atol=1e-12
            )
            torch.testing.assert_close(now[name].target, now[name].true, rtol=0, atol=1e-12)


# ---- memory, state


def test_no_graph_outlives_its_step_and_the_queue_stays_as_long():
    model, alive = net(2), []
    engine = attached(model, ["0", "1"], delayed(2, 2))
    user = torch.optim.SGD(model.parameters(), 0.1)
    model[0].register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
    sizes = []
    for batches in windows(12, features=6):
        update(engine, model, user, batches)
        sizes.append(sum(len(kept["gradients"]) for kept in engine.state_dict().get("delayed", [])))
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    per_stage = len(list(model[0].parameters()))
    assert sizes[:3] == [2 * per_stage, 4 * per_stage, 5 * per_stage]
    assert set(sizes[3:]) == {6 * per_stage}


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_is_the_run_bit_for_bit(stop):
    def run(model, engine, user, data):
        with engine:
            for batches in data:
                update(engine, model, user, batches)
        return model

    data, estimators = windows(9, accumulate=2, features=6), delayed(1, 2)
    whole = net(2, dropout=0.0)
    engine = DNIEngine(whole, ["0", "1"], estimators)
    user = torch.optim.Adam(whole.parameters())
    run(whole, engine, user, data[:stop])
    saved = copy.deepcopy({"model": weights(whole), "user": user.state_dict(), "engine": engine.state_dict()})
    kept = engine.state_dict()
    run(whole, engine, user, data[stop:])
    for one, other in zip(kept["delayed"], saved["engine"]["delayed"], strict=True):
        assert same_bits(one["gradients"], other["gradients"])  # what was saved is not what goes on
    other = net(2, dropout=0.0)
    other.load_state_dict(saved["model"])
    engine = DNIEngine(other, ["0", "1"], estimators)
    user = torch.optim.Adam(other.parameters())
    user.load_state_dict(saved["user"])
    engine.load_state_dict(saved["engine"])
    assert same_bits(weights(run(other, engine, user, data[stop:])), weights(whole))


def test_a_state_of_another_delay_or_model_is_refused():
    model = net(2)
    engine, _ = trained(model, delayed(1, 1), windows(4, features=6))
    state = engine.state_dict()
    other = DNIEngine(net(2), ["0", "1"], delayed(1, 2))
    with pytest.raises(EstimatorError, match="with `delay`=2, but got that of one with 1"):
        other.load_state_dict(state)
    state["delayed"][0]["gradients"] = {"gone.weight": torch.zeros(1)}
    with pytest.raises(
        EstimatorError, match=r"the model's own parameters, but got some of \['gone.weight'\]"
    ):
        DNIEngine(net(2), ["0", "1"], delayed(1, 1)).load_state_dict(state)


# ---- what is refused


@pytest.mark.parametrize("delay", [-1, 1.0, True, None])
def test_other_delays_are_refused(delay):
    spec = BoundarySpec("0", (LeafSpec((5,), torch.float32),))
    with unchecked(), pytest.raises(EstimatorError, match="Expected `delay` to be an integer of at least 0"):
        DelayedGradientEstimator(spec, delay=delay)


class Alone:
    """Averages nothing."""

    def begin(self, fresh):
        pass

    offer = offer_accumulated = end_group = merge = average = agree = begin


@pytest.mark.parametrize(
    ("options", "of_step", "what"),
    [
        ({"update_probability": 0.5}, {}, "update_probability below 1"),
        ({"exchange": Alone()}, {}, "other replicas"),
        ({}, {"scale": torch.tensor(8.0)}, "a gradient scaler"),
        ({}, {"several_losses": True}, "several losses or optimizers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_go_with_it_is_refused(options, of_step, what):
    model = net(2)
    engine = attached(model, ["0", "1"], DelayedGradientEstimator, **options)
    with pytest.raises(EstimatorError, match=f"DelayedGradientEstimator at boundary '0' and {what}. Leave"):
        run_step(engine, model, blobs(features=6), **of_step)


def test_steps_that_nobody_tells_of_are_refused():
    model = net(2)
    engine = attached(model, ["0", "1"], DelayedGradientEstimator)
    run_step(engine, model, blobs(features=6))
    with pytest.raises(StageError, match=r"Expected `engine.update_estimators\(\)` after 1 backward passes"):
        run_step(engine, model, blobs(features=6))


@pytest.mark.parametrize("estimator", [DelayedGradientEstimator, FeedbackAlignmentEstimator])
def test_lambda_is_refused_where_no_true_gradient_comes_back(estimator):
    """It was taken for granted, and did nothing; where backprop comes back, it may be anything."""
    model, said = net(2), rf"Expected bp_lambda=0 for {estimator.__name__} at boundary '1', .* but got 0.5"
    engine = attached(model, ["0", "1"], {"0": BackpropEstimator, "1": estimator}, bp_lambda=0.5)
    with pytest.raises(EstimatorError, match=said):
        run_step(engine, model, blobs(8, 6))
    engine.set_bp_lambda({"0": 0.5, "1": 0.0})
    run_step(engine, model, blobs(8, 6))
