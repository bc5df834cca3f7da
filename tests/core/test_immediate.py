"""Immediate updates are the paper's algorithm, and every stage's gradient is gone once it has stepped."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, mlp, run_step, same_bits, weights
from core.paper import (
    BOUNDARIES,
    ESTIMATORS,
    OPTIMIZERS,
    TOLERANCE,
    WIDTHS,
    batches,
    immediate,
    trained,
    twin_of,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_dni.core import DNIEngine, SplitOptimizer
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticEstimator, DirectFeedbackAlignmentEstimator, ZeroEstimator

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SGD = OPTIMIZERS["sgd"]


def seen_by(model, stage):
    """What `.grad` and the weights of all stages are when `stage` is run, step by step."""
    found = []
    look = lambda *_: found.append(
        ({n for n, p in model.named_parameters() if p.grad is not None}, weights(model))
    )
    model[stage].register_forward_pre_hook(look)
    return found


# ---- the same numbers as the paper's algorithm, and as one update at the end


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_algorithm_of_the_paper(optimizer, dtype):
    data = batches(12, dtype)
    model, start, *_ = trained(data, OPTIMIZERS[optimizer])
    twin = twin_of(start, OPTIMIZERS[optimizer])
    for x, y in data:
        twin.step(x, y)
    assert not same_bits(weights(model), weights(start))
    assert_close(weights(model), weights(twin.stages), TOLERANCE[dtype])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_one_update_at_the_end_to_the_bit(optimizer):
    data = batches(6, torch.float32)
    one, other = (trained(data, OPTIMIZERS[optimizer], update)[0] for update in ("immediate", "step"))
    assert same_bits(weights(one), weights(other))


def test_schedulers_move_the_rates_of_the_users_groups():
    data, runs = batches(6, torch.float32), []
    for update in ("immediate", "step"):
        made = []

        def optimizer(model, made=made):
            made.append(OPTIMIZERS["groups"](model))
            made.append(torch.optim.lr_scheduler.StepLR(made[0], 2, gamma=0.1))
            made[0].register_step_post_hook(lambda *_: made[1].step())
            return made[0]

        model, *_ = trained(data, optimizer, update)
        runs.append((weights(model), made))
    (one, (user, scheduler)), (other, (plain, _)) = runs
    assert same_bits(one, other)
    assert scheduler.last_epoch == 6  # hooks on the optimizer's steps run once per step
    assert [g["lr"] for g in user.param_groups] == [g["lr"] for g in plain.param_groups]
    assert [len(g["params"]) for g in user.param_groups] == [len(g["params"]) for g in plain.param_groups]


def test_hooks_on_the_steps_of_all_optimizers_run_once_per_step():
    model, seen = mlp(WIDTHS), []
    engine = immediate(model, BOUNDARIES, optimizer=(user := SGD(model)))
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    try:
        run_step(engine, model, blobs())
        user.step()
    finally:
        hook.remove()
    assert seen == [user]


def test_the_optimizers_state_is_what_one_update_at_the_end_leaves():
    data = batches(3, torch.float32)
    one, other = (
        trained(data, OPTIMIZERS["adam groups"], update)[3].state_dict() for update in ("immediate", "step")
    )
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    assert all(same_bits(one["state"][k], other["state"][k]) for k in one["state"])


# ---- when


def test_a_stage_has_stepped_and_let_go_of_its_gradient_before_the_next_one_runs():
    model = mlp(WIDTHS)
    engine, user = DNIEngine(model, BOUNDARIES, Told, update="immediate"), SGD(model)
    engine.updater = SplitOptimizer(user)
    start, found = weights(model), [seen_by(model, k) for k in range(4)]
    with engine:
        run_step(engine, model, blobs())
    for k, ((with_gradient, now),) in enumerate(found):
        assert with_gradient == set()
        moved = {name for name in now if not torch.equal(now[name], start[name])}
        assert moved == {name for name in now if int(name[0]) < k}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"3.weight", "3.bias"}


class Gradients:
    """Bytes of the parameters' gradients that are alive, at most; none is kept alive by it."""

    def __init__(self, model):
        self.storages, self.peak = {}, 0
        for p in model.parameters():
            p.register_hook(self.add)

    def add(self, gradient):
        storage = gradient.untyped_storage()
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {k: s for k, s in self.storages.items() if not s[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))


@pytest.mark.parametrize(("update", "stages"), [("immediate", 1), ("step", 9)])
def test_no_more_gradients_are_alive_than_those_of_one_stage(update, stages):
    width, rows = 32, 4
    hidden = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(9)]
    model = nn.Sequential(*hidden, nn.Linear(width, CLASSES))
    meter, user = Gradients(model), SGD(model)
    engine = attached(model, [str(k) for k in range(9)], update=update)
    engine.updater = SplitOptimizer(user)
    for _ in range(2):
        user.zero_grad()
        run_step(engine, model, (torch.randn(rows, width), torch.randint(0, CLASSES, (rows,))))
        user.step()
        engine.update_estimators()
    largest = 4 * (width * width + width)
    assert stages * largest <= meter.peak <= stages * largest + 4 * (CLASSES * width + CLASSES)


def test_a_stage_is_given_what_its_estimator_said_and_nothing_of_the_loss():
    results, (x, y) = [], blobs()
    for factor in (1.0, -50.0):
        torch.manual_seed(2)
        model = mlp(WIDTHS)
        start, engine = copy.deepcopy(model), immediate(model, BOUNDARIES)
        run_step(engine, model, (x, y), lambda out, y, factor=factor: factor * F.cross_entropy(out, y))
        results.append(weights(model[:3]))
    assert same_bits(*results)
    h = start[0](x)
    h.backward(torch.sin(h.detach()) / 8)
    before = start[0][0].weight
    assert torch.equal(model[0][0].weight, torch.add(before, before.grad, alpha=-0.1))


def test_the_zero_estimator_moves_nothing_below():
    model = mlp(WIDTHS)
    start, engine = weights(model[:3]), immediate(model, BOUNDARIES, ZeroEstimator)
    run_step(engine, model, blobs())
    assert same_bits(weights(model[:3]), start)


# ---- deferred to the end of the step, with the same numbers


def deferred(engine, model, **options):
    """Names of the parameters that still have a gradient when the step is over."""
    run_step(engine, model, blobs(), **options)
    return {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}


def test_a_probe_defers_all_of_it():
    engine = immediate(model := mlp(WIDTHS), BOUNDARIES)
    engine.request_probe()
    assert deferred(engine, model) == {"0", "1", "2", "3"}


def test_what_a_deferred_update_leaves_in_grad_is_not_added_to_the_next_one():
    model = mlp(WIDTHS)
    engine, (x, y) = immediate(model, BOUNDARIES), blobs()
    engine.request_probe()
    run_step(engine, model, (x, y))  # and nobody clears it before the next forward pass
    start = copy.deepcopy(model)
    run_step(engine, model, (x, y))
    h = start[0](x)
    before = start[0][0].weight
    before.grad = None
    h.backward(torch.sin(h.detach()) / 8)
    assert torch.equal(model[0][0].weight, torch.add(before, before.grad, alpha=-0.1))


@pytest.mark.parametrize("request_", ["request_probe", "request_report"])
def test_being_watched_changes_no_number(request_):
    data = batches(6, torch.float32)
    watch = lambda engine, step: step % 2 or getattr(engine, request_)()
    one, other = (trained(data, OPTIMIZERS["adam"], before=b)[0] for b in (watch, lambda *_: None))
    assert same_bits(weights(one), weights(other))


def test_a_probe_measures_what_it_measures_with_one_update_at_the_end():
    reports = []
    for update in ("immediate", "step"):
        probe = lambda engine, step: engine.request_probe()
        engine = trained(batches(1, torch.float32), SGD, update, before=probe)[2]
        reports.append(engine.last_report.boundaries["1"])
        torch.manual_seed(0)
    assert torch.equal(reports[0].true, reports[1].true)
    assert same_bits(reports[0].true_weights, reports[1].true_weights)
    assert same_bits(reports[0].applied_weights, reports[1].applied_weights)


@pytest.mark.parametrize(
    ("bp_lambda", "left"),
    [
        ({"2": 0.5, "*": 0.0}, "0123"),
        ({"1": 0.5, "*": 0.0}, "013"),
        ({"0": 1.0, "*": 0.0}, "03"),
    ],
    ids=str,
)
def test_lambda_defers_every_stage_below_its_boundary(bp_lambda, left):
    engine = immediate(model := mlp(WIDTHS), BOUNDARIES, bp_lambda=bp_lambda)
    assert deferred(engine, model) == set(left)
    data = batches(4, torch.float32)
    one, other = (
        trained(data, OPTIMIZERS["adam"], update, bp_lambda=bp_lambda)[0] for update in ("immediate", "step")
    )
    assert same_bits(weights(one), weights(other))


def test_an_estimator_that_is_told_first_defers_its_stage():
    told = {"1": DirectFeedbackAlignmentEstimator, "*": Told}
    model = mlp(WIDTHS)
    assert deferred(immediate(model, BOUNDARIES, told), model) == {"1", "3"}


def test_an_estimator_that_waits_for_the_output_to_learn_defers_nothing():
    model = mlp(WIDTHS)
    critic = partial(CriticEstimator, num_classes=CLASSES)
    engine = immediate(model, BOUNDARIES, critic)
    run_step(engine, model, blobs())
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"3"}


def test_accumulation_steps_on_the_last_part():
    results = []
    for update in ("immediate", "step"):
        torch.manual_seed(5)
        model = mlp(WIDTHS, batch_norm=True, dtype=torch.float32)
        user, engine = (
            OPTIMIZERS["adam"](model),
            attached(model, BOUNDARIES, ESTIMATORS[torch.float32], update=update),
        )
        engine.updater = SplitOptimizer(user)
        found = seen_by(model, 3)
        for _ in range(3):
            user.zero_grad()
            for part in range(2):
                run = {"accumulate": 2, "first": part == 0, "last": part == 1}
                run_step(
                    engine, model, blobs(8, 5, torch.float32), lambda a, b: F.cross_entropy(a, b) / 2, **run
                )
            user.step()
            engine.update_estimators()
        results.append(weights(model))
        if update == "immediate":
            held = [{n.split(".")[0] for n in names} for names, _ in found]
            assert held == [set(), {"3"}] * 3
    assert same_bits(*results)


def test_under_autocast_the_step_is_apart_from_it_and_what_is_looked_at_is_new():
    states = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            states.append(torch.is_autocast_enabled("cpu"))
            return super().step(closure)

    model = mlp(WIDTHS, dtype=torch.float32)
    engine = immediate(model, BOUNDARIES, optimizer=Watching(model.parameters(), 10.0))
    x, y = blobs(8, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), engine.training_step((x, y)):
        model(x)
        with torch.no_grad():
            looked = model[0](x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(looked, model[0](x))
    assert states == [False] * 3


def test_a_gradient_that_is_not_finite_is_judged_before_the_stage_steps():
    model = mlp(WIDTHS)
    start = weights(model)
    engine = immediate(model, BOUNDARIES, {"1": partial(Told, rule=lambda h: h / 0), "*": Told})
    with pytest.raises(EstimatorError, match="Expected Told at boundary '1' to give finite gradients"):
        run_step(engine, model, blobs())
    assert torch.equal(model[1][0].weight, start["1.0.weight"])


def test_skipping_leaves_such_a_stage_out():
    model = mlp(WIDTHS)
    start, told = weights(model), {"1": partial(Told, rule=lambda h: h / 0), "*": Told}
    engine = immediate(model, BOUNDARIES, told, on_nonfinite="skip")
    run_step(engine, model, blobs())
    assert engine.skipped == {"0": 0, "1": 1, "2": 0}
    moved = {n[0] for n, w in weights(model).items() if not torch.equal(w, start[n])}
    assert moved == {"0", "2"}
    assert model[1][0].weight.grad is None


class Wraps(torch.optim.Optimizer):
    """A wrapper that shares the groups of another optimizer and never calls Optimizer.__init__."""

    def __init__(self, base):
        self.base, self.param_groups, self.state = base, base.param_groups, base.state

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.base.step(closure)


def test_a_wrapper_of_an_optimizer_steps_the_stage_alone():
    """The wrapped one stepped all its groups, with what earlier batches of an accumulation had left."""
    results = []
    for when in ("immediate", "step"):
        torch.manual_seed(5)
        model = mlp(WIDTHS)
        user = Wraps(torch.optim.SGD([{"params": list(m.parameters())} for m in model], 0.1, momentum=0.9))
        engine = attached(model, BOUNDARIES, update=when)
        engine.updater = SplitOptimizer(user)
        for _ in range(3):
            user.zero_grad()
            for part in range(2):
                run_step(engine, model, blobs(), accumulate=2, first=part == 0, last=part == 1)
            user.step()
            engine.update_estimators()
        results.append(weights(model))
        assert [g["params"] for g in user.base.param_groups] == [list(m.parameters()) for m in model]
    assert same_bits(*results)


# ---- variables that are not the optimizer's


def test_what_the_optimizer_does_not_have_keeps_its_gradient():
    model = mlp(WIDTHS)
    engine = immediate(model, BOUNDARIES, optimizer=torch.optim.SGD(model[:1].parameters(), 0.1))
    x, y = blobs()
    run_step(engine, model, (x.requires_grad_(), y))
    assert model[0][0].weight.grad is None
    assert model[1][0].weight.grad is not None
    assert x.grad is not None


# ---- the user's optimizer afterwards


def test_an_error_in_the_optimizer_leaves_it_whole():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    model = mlp(WIDTHS)
    user = Broken([{"params": [p]} for p in model.parameters()], 0.1)
    user.register_step_pre_hook(hook := lambda *_: None)
    engine = immediate(model, optimizer=user)
    with pytest.raises(ArithmeticError):
        run_step(engine, model, blobs())
    assert [g["params"][0] is p for g, p in zip(user.param_groups, model.parameters(), strict=True)] == [
        True
    ] * 8
    assert list(user._optimizer_step_pre_hooks.values()) == [hook]
