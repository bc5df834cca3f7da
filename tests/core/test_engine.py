"""Whole runs of the engine against naive loops and plain backprop."""

import copy
from functools import partial

import pytest
import torch
from core.nets import (
    CLASSES,
    VECTOR_ESTIMATORS,
    Told,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
    train,
    unchecked,
    weights,
)
from oracles import NaiveLinearDNI, decoupled_backward, mlp_stages
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators import LinearEstimator, ZeroEstimator

WIDTHS = (5, 6, 7, 6)
LINEAR = partial(LinearEstimator, num_classes=CLASSES)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}


def naive_run(stages, optimizer, batches, bp_lambda):
    naive = NaiveLinearDNI(stages, WIDTHS[1:], CLASSES, bp_lambda=bp_lambda, lr=1e-2)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        losses.append(naive.gradients(x, y))
        optimizer.step()
    return naive, losses


@pytest.mark.parametrize("bp_lambda", [0.0, 0.25])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fifty_steps_are_those_of_the_naive_loop(optimizer, batch_norm, bp_lambda):
    model, batches = mlp_stages(WIDTHS, CLASSES, batch_norm), [blobs(32) for _ in range(50)]
    twin = copy.deepcopy(model)
    make = OPTIMIZERS[optimizer]
    engine = DNIEngine(
        model,
        ["0", "1", "2"],
        LINEAR,
        bp_lambda=bp_lambda,
        estimator_optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    losses = train(engine, model, make(model.parameters()), batches)
    naive, expected = naive_run(twin, make(twin.parameters()), batches, bp_lambda)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10)
    assert_close(weights(model), weights(twin), atol=1e-10)
    for k, estimator in enumerate(engine.estimators.values()):
        a, b = naive.maps[k].weight.split([WIDTHS[k + 1], CLASSES], 1)
        torch.testing.assert_close(estimator.map.weight, a, rtol=0, atol=1e-10)
        torch.testing.assert_close(estimator.conditioning.weight, b.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bp_lambda", [0.0, 0.25, 0.5, 1.0])
def test_every_lambda_is_the_oracles(bp_lambda):
    model, (x, y) = mlp((*WIDTHS, CLASSES)), blobs()
    twin = copy.deepcopy(model)
    loss = run_step(attached(model, ["0", "1", "2"], bp_lambda=bp_lambda), model, (x, y))
    expected, _ = decoupled_backward(
        twin, x, lambda out: F.cross_entropy(out, y), [torch.sin] * 3, [bp_lambda] * 3
    )
    assert torch.equal(loss, expected)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("lambdas", [(0, 1, 0.5), (0.5, 0, 1), (1, 0.25, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)])
def test_lambda_by_boundary_is_the_oracles(lambdas):
    model, (x, y) = mlp((*WIDTHS, CLASSES)), blobs()
    twin = copy.deepcopy(model)
    chosen = dict(zip("012", map(float, lambdas), strict=True))
    run_step(attached(model, ["0", "1", "2"], bp_lambda=chosen), model, (x, y))
    decoupled_backward(twin, x, lambda out: F.cross_entropy(out, y), [torch.sin] * 3, lambdas)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("bp_lambda", [0.25, 0.5])
def test_no_gradient_is_mixed_as_zero(bp_lambda):
    model, (x, y) = mlp(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0", "1"], ZeroEstimator, bp_lambda=bp_lambda), model, (x, y))
    decoupled_backward(twin, x, lambda out: F.cross_entropy(out, y), [None] * 2, [bp_lambda] * 2)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("estimator", VECTOR_ESTIMATORS)
def test_full_lambda_is_backprop(estimator):
    torch.manual_seed(1)
    model = mlp((*WIDTHS, CLASSES), dropout=0.3, batch_norm=True)
    twin, batches = copy.deepcopy(model), [blobs() for _ in range(20)]
    engine = DNIEngine(model, ["0", "1", "2"], VECTOR_ESTIMATORS[estimator], bp_lambda=1.0)
    torch.manual_seed(2)
    losses = train(engine, model, torch.optim.Adam(model.parameters(), 1e-2), batches)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(twin.parameters(), 1e-2)
    for (x, y), loss in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected)
    assert same_bits(weights(model), weights(twin))
    assert torch.equal(state, torch.get_rng_state())


def test_zero_estimators_leave_everything_below_the_last_boundary_alone():
    model, batches = mlp((*WIDTHS, CLASSES)), [blobs() for _ in range(5)]
    before = weights(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    train(DNIEngine(model, ["0", "1", "2"], ZeroEstimator), model, optimizer, batches)
    after = weights(model)
    assert all(p.grad is None for p in model[:3].parameters())
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("3"))
    assert not torch.equal(before["3.weight"], after["3.weight"])


def test_the_first_step_leaves_what_is_below_estimators_that_start_at_zero_as_it_was():
    model, (x, y) = mlp((*WIDTHS, CLASSES)), blobs()
    start = weights(model)
    engine = DNIEngine(model, ["0", "1", "2"], LINEAR, estimator_optimizer=partial(torch.optim.SGD, lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    with engine:
        for _ in range(2):
            with engine.training_step((x, y)):
                loss = F.cross_entropy(model(x), y)
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
            moved.append({n for n, w in weights(model).items() if not torch.equal(w, start[n])})
    assert moved == [{"3.weight", "3.bias"}, {"2.0.weight", "2.0.bias", "3.weight", "3.bias"}]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), {"0": 0.0, "1": 2.0}])
def test_a_lambda_outside_its_range_is_refused(value):
    with pytest.raises(EstimatorError, match=r"`bp_lambda` to be in \[0, 1\], but got .* for boundary"):
        DNIEngine(mlp(), ["0", "1"], Told, bp_lambda=value)


def test_a_refused_lambda_changes_nothing():
    engine = DNIEngine(mlp(), ["0", "1"], Told, bp_lambda=0.5)
    with pytest.raises(EstimatorError, match="bp_lambda"):
        engine.set_bp_lambda({"0": 0.0, "1": 2.0})
    assert engine.bp_lambda == {"0": 0.5, "1": 0.5}


def test_lambda_changes_from_the_next_step_on():
    model, batch = mlp(), blobs()
    engine = attached(model, ["0", "1"], ZeroEstimator)
    run_step(engine, model, batch)
    assert model[0][0].weight.grad is None
    engine.set_bp_lambda(1.0)
    run_step(engine, model, batch)
    assert model[0][0].weight.grad is not None


def test_an_unknown_rng_is_refused():
    with unchecked(), pytest.raises(EstimatorError, match="`rng` to be 'global' or 'stage', but got 'local'"):
        DNIEngine(mlp(), ["0"], Told, rng="local")


def test_backward_without_a_step_is_refused():
    model = mlp()
    with pytest.raises(StageError, match="training step before backward"):
        attached(model, ["0"]).backward(model(blobs()[0]).sum())


def test_a_second_backward_of_one_step_is_refused():
    model, batch = mlp(), blobs()
    engine = attached(model, ["0"])
    run_step(engine, model, batch)
    with pytest.raises(StageError, match="training step before backward"):
        engine.backward(model(batch[0]).sum())


def test_a_step_without_attach_is_refused():
    engine = DNIEngine(mlp(), ["0"], Told)
    with pytest.raises(StageError, match=r"engine to be attached.*`with engine:`"), engine.training_step():
        pass


def test_a_second_attach_is_refused():
    engine = attached(mlp(), ["0"])
    with pytest.raises(StageError, match=r"already has its\. Call `detach\(\)`"):
        engine.attach()


def test_a_second_engine_on_one_model_is_refused():
    model = mlp()
    first, second = attached(model, ["0"]), DNIEngine(model, ["1"], Told)
    with pytest.raises(StageError, match=r"already has another engine's\. Call `detach\(\)`"):
        second.attach()
    first.detach()
    second.attach()


def test_an_unknown_output_is_refused():
    from lightning_dni.errors import BoundaryError

    with pytest.raises(BoundaryError, match="`output` to name a submodule of Sequential, but got 'head'"):
        DNIEngine(mlp(), ["0"], Told, output="head")


def test_the_thirds_of_backward_are_the_whole():
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, ["0", "1"], bp_lambda=0.5)
    with engine.training_step(batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    engine.prepare_backward(loss)
    loss.backward()
    engine.finish_backward()
    run_step(attached(twin, ["0", "1"], bp_lambda=0.5), twin, batch)
    assert same_bits(grads(model), grads(twin))


def test_a_continued_run_is_the_run():
    kinds = {
        "0": VECTOR_ESTIMATORS["linear"],
        "1": VECTOR_ESTIMATORS["mlp"],
        "2": VECTOR_ESTIMATORS["critic"],
    }
    batches, ends = [blobs() for _ in range(8)], []
    for restart in (False, True):
        torch.manual_seed(3)
        model = mlp((*WIDTHS, CLASSES), dropout=0.2)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        engine = DNIEngine(model, ["0", "1", "2"], kinds, bp_lambda={"1": 0.5, "*": 0.0}, rng="stage", seed=7)
        train(engine, model, optimizer, batches[:4])
        if restart:
            saved = copy.deepcopy(engine.state_dict())
            engine = DNIEngine(model, ["0", "1", "2"], kinds, rng="stage", seed=8)
            engine.load_state_dict(saved)
        train(engine, model, optimizer, batches[4:])
        ends.append([weights(model), *(weights(e) for e in engine.estimators.values())])
    assert all(same_bits(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_is_tensors_and_primitives():
    model = mlp()
    engine = attached(model, ["0", "1"], VECTOR_ESTIMATORS["mlp"])
    run_step(engine, model, blobs())
    engine.update_estimators()
    torch.save(engine.state_dict(), "state.pt")
    state = torch.load("state.pt", weights_only=True)
    engine.load_state_dict(state)
    assert state["steps"] == 1


def test_describe_is_in_primitives():
    engine = DNIEngine(mlp(), ["1", "0"], Told, bp_lambda=0.5, seed=4)
    facts = engine.describe()
    assert facts["boundaries"] == ["0", "1"]
    assert facts["bp_lambda"] == {"0": 0.5, "1": 0.5}
    assert facts["seed"] == 4
