"""What is not finite stops training by name, or is skipped and counted; nothing else is touched."""

import copy

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS, assert_close, attached, blobs, grads, mlp, run_step, same_bits
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import EstimatorError, StageError

LINEAR = VECTOR_ESTIMATORS["linear"]
NAN, INF = float("nan"), float("inf")
LEARNED = [name for name in VECTOR_ESTIMATORS if name != "zero"]


def poison(module, value=NAN):
    """Make one element of every parameter `value`."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.view(-1)[0] = value


def stepped(model, names=("0", "1"), estimator=LINEAR, **options):
    """An engine whose estimators are built and have taken a step."""
    engine = attached(model, list(names), estimator, **options)
    run_step(engine, model, blobs())
    engine.update_estimators()
    model.zero_grad()
    return engine


# ---- training stops


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("name", LEARNED)
def test_an_estimator_that_diverged_is_named_with_its_step(name, bp_lambda, value):
    model = mlp()
    engine = stepped(model, estimator=VECTOR_ESTIMATORS[name], bp_lambda=bp_lambda)
    poison(engine.estimators["1"], value)
    with pytest.raises(EstimatorError, match=r"boundary '1' to give finite.*step 1: its parameters are no"):
        run_step(engine, model, blobs())


@pytest.mark.parametrize("name", VECTOR_ESTIMATORS)
def test_an_activation_that_is_not_finite_is_named_where_it_first_appears(name):
    model = mlp()
    engine = stepped(model, estimator=VECTOR_ESTIMATORS[name])
    poison(model[1])
    with pytest.raises(
        EstimatorError, match=r"boundary '1' to give finite.*from finite parameters: the activ"
    ):
        run_step(engine, model, blobs())


def test_a_loss_that_is_not_finite_is_named_before_what_follows_from_it():
    model = mlp()
    engine = stepped(model)
    with pytest.raises(StageError, match="finite loss, but got nan in step 1"):
        run_step(engine, model, blobs(), lambda out, y: F.cross_entropy(out, y) * NAN)


def test_a_target_that_is_not_finite_is_named():
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * INF

    model = mlp()
    engine = stepped(model)
    with pytest.raises(
        EstimatorError, match=r"finite target gradient for LinearEstimator at boundary '1'.*step 1"
    ):
        run_step(engine, model, blobs(), lambda out, y: F.cross_entropy(Spike.apply(out), y))


def test_what_was_not_looked_at_is_found_at_the_next_look():
    """As on an accelerator: nothing is read on most steps, and the step of the fault is still known."""
    model = mlp()
    engine = stepped(model)
    engine._device = torch.device("meta")  # any device that is not the CPU
    poison(engine.estimators["0"])
    for _ in range(3):
        run_step(engine, model, blobs())
        model.zero_grad()
    with pytest.raises(EstimatorError, match=r"boundary '0' to give finite.*step 1:"):
        engine.check_values()
    engine.check_values()  # once


def test_a_bad_step_leaves_nothing_behind():
    model = mlp()
    engine = stepped(model)
    good = copy.deepcopy(engine.estimators["1"].state_dict())
    poison(engine.estimators["1"])
    with pytest.raises(EstimatorError):
        run_step(engine, model, blobs())
    assert all(p.grad is None for p in engine.estimators["0"].parameters())
    engine.estimators["1"].load_state_dict(good)
    model.zero_grad()
    run_step(engine, model, blobs())


# ---- or goes on


@pytest.mark.parametrize("name", LEARNED)
def test_a_diverged_estimator_is_left_out_and_so_is_its_stage(name):
    model = mlp()
    engine = stepped(model, estimator=VECTOR_ESTIMATORS[name], on_nonfinite="skip")
    assert engine.skipped == {"0": 0, "1": 0}
    poison(engine.estimators["1"])
    before = [copy.deepcopy(dict(e.named_parameters())) for e in engine.estimators.values()]
    run_step(engine, model, blobs())
    engine.update_estimators()
    assert all(p.grad is None for p in model[1].parameters())
    for stage in (model[0], model[2]):
        assert all(p.grad.isfinite().all() for p in stage.parameters())
    after = [dict(e.named_parameters()) for e in engine.estimators.values()]
    assert engine.skipped["1"] == 1
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0, equal_nan=True)
    if engine.estimators["0"].learns_from_network and name != "critic":  # its target came out of that stage
        assert engine.skipped["0"] == 1
        assert same_bits(after[0], before[0])
    assert all(t.isfinite().all() for t in after[0].values())


def test_what_is_finite_is_learnt_as_ever():
    batches, runs = [blobs() for _ in range(3)], []
    for choice in ("raise", "skip"):
        torch.manual_seed(1)
        model = mlp()
        engine = attached(model, ["0", "1"], LINEAR, on_nonfinite=choice)
        for batch in batches:
            run_step(engine, model, batch)
            engine.update_estimators()
        runs.append(
            (grads(model), {n: grads(e) | dict(e.state_dict()) for n, e in engine.estimators.items()})
        )
    assert same_bits(runs[0][0], runs[1][0])
    assert all(same_bits(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])


def test_an_exploding_target_costs_the_estimator_its_update_and_the_stage_nothing():
    model = mlp()
    engine = stepped(model, names=["0"], on_nonfinite="skip")
    before = copy.deepcopy(engine.estimators["0"].state_dict())
    x, y = blobs()
    with engine.training_step((x, y)):
        out = model(x)
        out.register_hook(lambda g: g * INF)
        loss = F.cross_entropy(out, y)
    engine.backward(loss)
    engine.update_estimators()
    assert engine.skipped == {"0": 1}
    assert same_bits(dict(engine.estimators["0"].state_dict()), before)
    assert all(p.grad.isfinite().all() for p in model[0].parameters())


def seeded_step(**options):
    torch.manual_seed(1)
    model = mlp()
    return model, stepped(model, names=["0"], **options)


@pytest.mark.parametrize("bad", [(0,), (0, 2), (0, 1, 2)])
def test_an_update_counts_once_however_many_of_its_batches_were_left_out(bad):
    """What is finite of them is learnt as if the others had not been there."""
    (model, engine), (twin, alone) = (seeded_step(on_nonfinite=choice) for choice in ("skip", "raise"))
    batches = [blobs() for _ in range(3)]

    def spike(out, y):
        out.register_hook(lambda g: g * INF)
        return F.cross_entropy(out, y)

    for _ in range(2):
        for k, batch in enumerate(batches):
            run_step(engine, model, batch, spike if k in bad else F.cross_entropy, accumulate=3)
            if k not in bad:
                run_step(alone, twin, batch, accumulate=3)
        for each in (engine, alone):
            each.update_estimators()
    assert same_bits(*(each.estimators["0"].state_dict() for each in (engine, alone)))
    assert engine.skipped == {"0": 2}


def test_what_a_dropped_step_has_skipped_does_not_hide_what_the_next_skips():
    model = mlp()
    engine = stepped(model, names=["0"], on_nonfinite="skip")
    poison(engine.estimators["0"])
    for _ in range(3):
        run_step(engine, model, blobs())
        engine.drop_estimator_gradients()
    assert engine.skipped == {"0": 3}


def test_a_loss_that_is_not_finite_stops_training_all_the_same():
    model = mlp()
    engine = stepped(model, on_nonfinite="skip")
    with pytest.raises(StageError, match="finite loss"):
        run_step(engine, model, blobs(), lambda out, y: F.cross_entropy(out, y) * NAN)


# ---- under a gradient scaler


def test_a_scaler_finds_what_is_not_finite_and_the_estimators_learn_nothing_of_it():
    model = mlp()
    engine = stepped(model)
    assert engine.skipped == {}
    x, y = blobs()
    with engine.training_step((x, y), scale=torch.tensor(4.0, dtype=torch.float64)):
        out = model(x)
        out.register_hook(lambda g: g * INF)
        loss = F.cross_entropy(out, y) * 4.0
    engine.backward(loss)
    assert not all(p.grad.isfinite().all() for p in model[2].parameters())
    assert all(p.grad is None for p in engine.estimators["1"].parameters())
    assert engine.skipped == {"1": 1}


def test_an_estimator_that_diverged_under_a_scaler_is_named_all_the_same():
    model = mlp()
    engine = stepped(model)
    poison(engine.estimators["1"])
    with pytest.raises(
        EstimatorError, match=r"'1' to give finite.*scaler has skipped: its parameters are no"
    ):
        run_step(engine, model, blobs(), scale=torch.tensor(4.0, dtype=torch.float64))


def test_an_empty_batch_is_finite():
    model = mlp()
    x, y = blobs()
    engine = attached(model, ["0", "1"], LINEAR)
    run_step(engine, model, (x[:0], y[:0]), lambda out, y: F.cross_entropy(out, y, reduction="sum"))
    assert_close(grads(model[0]), {n: torch.zeros_like(p) for n, p in nn.Module.named_parameters(model[0])})
