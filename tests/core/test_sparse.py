"""Stages that sit a step out by chance: what then runs, what learns, and what is drawn."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, mlp, run_step, same_bits, weights
from core.paper import BOUNDARIES, ESTIMATORS, OPTIMIZERS, TOLERANCE, WIDTHS, batches, trained, twin_of
from core.test_memory import NETS, Meter, batch_for, largest_stage
from oracles import decoupled_backward, plain_gradients, sparse_backprop
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.core.boundary import LAST_STAGE
from lightning_dni.core.sparse import draw_asleep
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import CriticEstimator, DirectFeedbackAlignmentEstimator, LocalLossEstimator

ALL = [*BOUNDARIES, LAST_STAGE]


def awake_in(step, probability, seed=7):
    """Which of the four stages run in a step, lowest first."""
    asleep = draw_asleep(dict.fromkeys(ALL, probability), seed, step)
    return [name not in asleep for name in ALL]


def asleep(model, names, estimator=Told, **options):
    """An attached engine in whose first step just the stages below `names` sit out."""
    chances = {name: 1e-9 if name in names else 1.0 for name in ALL}
    return attached(model, BOUNDARIES, estimator, update_probability=chances, **options)


# ---- what is drawn


def test_each_stage_runs_as_often_as_it_should_and_independently():
    runs = torch.tensor([awake_in(step, 0.3) for step in range(4000)], dtype=torch.float64)
    assert (runs.mean(0) - 0.3).abs().max() < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.corrcoef(runs.T).triu(1).abs().max() < 4 / 4000**0.5
    later = torch.corrcoef(torch.cat([runs[1:], runs[:-1]], 1).T)[:4, 4:]
    assert later.abs().max() < 4 / 4000**0.5


def test_another_seed_draws_otherwise_and_the_same_seed_the_same():
    drawn = [[awake_in(step, 0.5, seed) for step in range(64)] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_more_often_means_also_then():
    """What runs at one probability runs at a greater one, too: runs at several are comparable."""
    for step in range(50):
        assert all(b or not a for a, b in zip(awake_in(step, 0.2), awake_in(step, 0.6), strict=True))


def test_no_other_generator_is_drawn_from():
    data, states = batches(3, torch.float32), []
    for options in ({"update_probability": 0.5}, {}):
        trained(data, OPTIMIZERS["sgd"], "step", **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.5, {"0": 0.5, "1": 0.5, "2": 0.5, LAST_STAGE: 0.5}),
        ({"*": 0.5}, {"0": 0.5, "1": 0.5, "2": 0.5, LAST_STAGE: 0.5}),
        ({"0": 0.1, "[12]": 0.2}, {"0": 0.1, "1": 0.2, "2": 0.2, LAST_STAGE: 1.0}),
        ({LAST_STAGE: 0.3, "*": 1}, {"0": 1.0, "1": 1.0, "2": 1.0, LAST_STAGE: 0.3}),
    ],
    ids=str,
)
def test_one_value_or_patterns(given, expected):
    engine = DNIEngine(mlp(WIDTHS), BOUNDARIES, Told, update_probability=given)
    assert engine.update_probability == expected


@pytest.mark.parametrize("value", [0.0, 1.5, -0.1])
def test_other_values_are_refused(value):
    with pytest.raises(EstimatorError, match=r"Expected `update_probability` to be in \(0, 1\], but got"):
        DNIEngine(mlp(WIDTHS), BOUNDARIES, Told, update_probability={"1": value, "*": 1.0})


def test_a_boundary_without_a_value_is_refused():
    with pytest.raises(
        BoundaryError, match="Expected a pattern in `update_probability` to match boundary '1'"
    ):
        DNIEngine(mlp(WIDTHS), BOUNDARIES, Told, update_probability={"0": 0.5})


# ---- the oracles


@pytest.mark.parametrize("update", ["step", "immediate"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam groups"])
def test_it_is_the_algorithm_of_the_paper(optimizer, dtype, update):
    data = batches(16, dtype)
    model, start, *_ = trained(data, OPTIMIZERS[optimizer], update, update_probability=0.4)
    twin = twin_of(start, OPTIMIZERS[optimizer])
    for step, (x, y) in enumerate(data):
        twin.step(x, y, awake_in(step, 0.4))
    assert_close(weights(model), weights(twin.stages), TOLERANCE[dtype])


@pytest.mark.parametrize("update", ["step", "immediate"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_order_in_which_stages_update_changes_no_number(dtype, update):
    """In the paper's experiment it is random: what a stage does needs nothing of what others do meanwhile."""
    data = batches(16, dtype)
    model, start, *_ = trained(data, OPTIMIZERS["sgd"], update, update_probability=0.7)
    twin, orders = twin_of(start, OPTIMIZERS["sgd"]), torch.Generator().manual_seed(1)
    for step, (x, y) in enumerate(data):
        order = torch.randperm(len(ALL), generator=orders).tolist()
        twin.step(x, y, awake_in(step, 0.7), order=order)
    assert_close(weights(model), weights(twin.stages), TOLERANCE[dtype])


def test_at_one_everything_is_as_without():
    data = batches(4, torch.float32)
    runs = [
        weights(trained(data, OPTIMIZERS["adam"], "step", **options)[0])
        for options in ({"update_probability": {"*": 1.0}}, {})
    ]
    assert same_bits(*runs)


def test_full_lambda_is_sparse_backprop():
    model, data = mlp(WIDTHS), batches(12, torch.float64)
    engine = attached(model, BOUNDARIES, bp_lambda=1.0, update_probability=0.5, seed=7)
    patterns = set()
    for step, batch in enumerate(data):
        model.zero_grad()
        run_step(engine, model, batch)
        found = grads(model)
        model.zero_grad()
        engine.detach()
        sparse_backprop(model, *batch, awake_in(step, 0.5))
        engine.attach()
        assert same_bits(found, grads(model))
        patterns.add(tuple(g is None for g in found.values()))
    assert len(patterns) > 2


@pytest.mark.parametrize("names", [["2"], ["1"], [LAST_STAGE], ["0", "2"]], ids=str)
def test_a_stage_that_mixes_sits_out_with_the_one_above(names):
    """0.5 at boundaries 0 and 1, 0 at 2: whoever waits for what does not come does not run."""
    model, (x, y) = mlp(WIDTHS), blobs()
    lambdas = {"0": 0.5, "1": 0.5, "2": 0.0}
    run_step(asleep(model, names, bp_lambda=lambdas), model, (x, y))
    found = grads(model)
    model.zero_grad()
    decoupled_backward(model, x, lambda out: F.cross_entropy(out, y), [torch.sin] * 3, [0.5, 0.5, 0.0])
    runs = {LAST_STAGE: LAST_STAGE not in names, "2": "2" not in names}
    runs["1"] = "1" not in names and runs["2"]
    runs["0"] = "0" not in names and runs["1"]
    expected = {n: g if runs[LAST_STAGE if n[0] == "3" else n[0]] else None for n, g in grads(model).items()}
    assert_close(found, expected)


# ---- who learns


def learnt(engine):
    """Boundaries whose estimator has a gradient."""
    return {n for n, e in engine.estimators.items() if any(p.grad is not None for p in e.parameters())}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "012"),
        (["1"], "12"),
        (["0", "2"], "02"),
        ([LAST_STAGE], "01"),
        (ALL, ""),
    ],
    ids=str,
)
def test_an_estimator_is_told_a_target_only_by_a_stage_that_ran(names, expected):
    model = mlp(WIDTHS)
    engine = asleep(model, names, ESTIMATORS[torch.float64])
    run_step(engine, model, blobs())
    assert learnt(engine) == set(expected)
    engine.update_estimators()


@pytest.mark.parametrize("kind", [LocalLossEstimator, CriticEstimator])
def test_an_estimator_that_needs_no_target_learns_in_every_step(kind):
    model = mlp(WIDTHS)
    engine = asleep(model, ALL, partial(kind, num_classes=CLASSES))
    run_step(engine, model, blobs())
    assert learnt(engine) == {"0", "1", "2"}
    assert all(g is None for g in grads(model).values())


def test_direct_feedback_needs_the_loss_and_no_stage_between():
    model, batch = mlp(WIDTHS), blobs()
    run_step(asleep(model, ["1"], DirectFeedbackAlignmentEstimator), model, batch)
    assert {n[0] for n, g in grads(model).items() if g is not None} == {"0", "2", "3"}
    model = mlp(WIDTHS)
    run_step(asleep(model, [LAST_STAGE], DirectFeedbackAlignmentEstimator), model, batch)
    assert all(g is None for g in grads(model).values())


# ---- several forward passes in a step


def test_what_sits_out_is_drawn_once_for_accumulated_batches():
    model = mlp(WIDTHS)
    engine = attached(model, BOUNDARIES, update_probability=0.5, seed=7)
    patterns = []
    for _ in range(6):
        for part in range(3):
            model.zero_grad()
            run_step(engine, model, blobs(), accumulate=3, first=part == 0, last=part == 2)
            patterns.append(tuple(sorted({n[0] for n, g in grads(model).items() if g is not None})))
    windows = [patterns[k : k + 3] for k in range(0, 18, 3)]
    assert all(len(set(window)) == 1 for window in windows)
    assert len({window[0] for window in windows}) > 1


def test_the_state_goes_on_with_the_draws():
    data = batches(9, torch.float32)
    whole, *_ = trained(data, OPTIMIZERS["sgd"], "step", update_probability=0.5)
    half, _, engine, _ = trained(data[:5], OPTIMIZERS["sgd"], "step", update_probability=0.5)
    state = engine.state_dict()
    again = attached(half, BOUNDARIES, ESTIMATORS[torch.float32], update_probability=0.5, seed=99,
                     estimator_optimizer=partial(torch.optim.SGD, lr=0.5))  # fmt: skip
    again.load_state_dict(state)
    user = OPTIMIZERS["sgd"](half)
    for batch in data[5:]:
        user.zero_grad()
        run_step(again, half, batch)
        user.step()
        again.update_estimators()
    assert same_bits(weights(half), weights(whole))


def test_a_run_that_goes_on_within_an_accumulated_batch_draws_for_the_rest_of_it():
    """All stages updated there, as nothing was drawn before its first part."""
    model = mlp(WIDTHS)
    engine = asleep(model, ["1"])
    state = engine.state_dict()
    for _ in range(2):
        model.zero_grad()
        run_step(engine, model, blobs(), accumulate=3, first=False, last=False)
        assert {n[0] for n, g in grads(model).items() if g is not None} == {"0", "2", "3"}
        engine.load_state_dict(state)


# ---- what is measured


@pytest.mark.parametrize("names", [["1"], [LAST_STAGE], ALL], ids=str)
def test_a_probe_measures_the_true_gradients_of_a_step_that_stages_sit_out(names):
    model, (x, y) = mlp(WIDTHS), blobs()
    engine = asleep(model, names)
    engine.request_probe()
    run_step(engine, model, (x, y))
    report = engine.last_report.boundaries
    engine.detach()
    _, true = plain_gradients(model, x, lambda out: F.cross_entropy(out, y), BOUNDARIES)
    above = dict(zip(BOUNDARIES, ALL[1:], strict=True))
    for name in BOUNDARIES:
        torch.testing.assert_close(report[name].true, true[name] * 8, rtol=0, atol=1e-12)
        assert (report[name].target is None) == (above[name] in names)
        assert bool(report[name].applied_weights) == bool(report[name].true_weights) == (name not in names)


def test_a_probe_changes_no_number():
    data = batches(8, torch.float32)
    probe = lambda engine, step: engine.request_probe()
    run = partial(trained, data, OPTIMIZERS["adam"], "step", update_probability=0.5)
    assert same_bits(weights(run(before=probe)[0]), weights(run()[0]))


@pytest.mark.parametrize("probability", [1e-9, 0.5])
def test_no_more_than_the_largest_stage_is_alive(probability):
    make, shape = NETS["16-stage MLP"]
    model, batch = make(), batch_for(shape)
    largest = largest_stage(model, batch)
    engine = attached(model, [str(k) for k in range(16)], update_probability=probability, seed=0)
    with Meter(lambda: [model], list(model[:-1]), batch) as meter:
        run_step(engine, model, batch)
    assert meter.peak <= 1.5 * largest
