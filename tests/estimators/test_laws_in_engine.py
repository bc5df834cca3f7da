"""Laws of the estimators in the engine, at two boundaries, each over every row of the table."""

import copy

import pytest
import torch
from tables import (
    ESTIMATORS,
    LEARNED,
    ROWWISE,
    batch_for,
    each,
    exact,
    loss_of,
    network,
    synthesize,
)
from torch.testing import assert_close

from lightning_dni.core import DNIEngine


def engine_for(row, dtype=torch.float32, stirred=False, **options):
    """A network of the row's kind, an engine with the row's estimator twice, and a batch."""
    model, inputs = network(row, dtype)
    factory = (lambda spec: row.stirred()) if stirred else row.make
    engine = DNIEngine(model, ["0", "1"], factory, labels=1, **options)
    return model, engine, batch_for(row, inputs, dtype=dtype)


def step(model, engine, batch, accumulate=1):
    """Forward and backward, as a user's loop does; nobody steps."""
    with engine.training_step(batch[:2], accumulate=accumulate):
        loss = loss_of(model(batch[0]), batch[2]) / accumulate
    engine.backward(loss)
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each(ESTIMATORS)
def test_trains_in_an_engine(row, dtype):
    model, engine, batch = engine_for(row, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine:
        for _ in range(3):
            optimizer.zero_grad()
            assert step(model, engine, batch).isfinite()
            for estimator in engine.estimators.values():
                for name, parameter in estimator.named_parameters():
                    assert parameter.dtype == dtype
                    assert parameter.grad is not None, name
            optimizer.step()
            engine.update_estimators()
    assert list(engine.estimators) == ["0", "1"]


@each(LEARNED)
def test_takes_several_steps_on_one_lesson(row):
    """The network stands still here, so a lesson learnt twice is two steps with one lesson each."""
    found = []
    for steps in (1, 2):
        model, engine, batch = engine_for(row, torch.float64, stirred=True, estimator_steps=steps)
        with engine:
            for _ in range(2 // steps):
                step(model, engine, batch)
                engine.update_estimators()
        found.append([p.detach() for p in engine.estimators["1"].parameters()])
    assert_close(found[1], found[0])


@each(ESTIMATORS)
def test_nothing_but_the_synthetic_gradient_reaches_the_stage(row):
    model, engine, batch = engine_for(row, torch.float64, stirred=True)
    with engine:
        step(model, engine, batch)
        model.zero_grad()
        twins = copy.deepcopy(engine.estimators)
        step(model, engine, batch)
    engine_gradients = {n: p.grad for n, p in model.named_parameters()}
    below = batch[0]
    for name, twin in twins.items():
        stage = model.get_submodule(name)
        outputs = stage(below)
        leaves = outputs if isinstance(outputs, tuple) else (outputs,)
        h = tuple(leaf.detach() for leaf in leaves)
        synthetic = synthesize(twin, h, batch[1] if row.context != "none" else None)
        for parameter_name, parameter in stage.named_parameters():
            given = engine_gradients[f"{name}.{parameter_name}"]
            if synthetic is None:
                assert given is None
                continue
            expected = torch.autograd.grad(
                leaves, parameter, [g / len(h[0]) for g in synthetic], retain_graph=True, allow_unused=True
            )
            assert_close(given, expected[0])
        below = h if isinstance(outputs, tuple) else h[0]


@each(ROWWISE)
def test_accumulated_batches_are_one_batch(row):
    """As far as boundary batch statistics allow; every gradient, of stages and of estimators."""
    found = []
    for parts in (1, 2):
        model, engine, batch = engine_for(row, torch.float64, stirred=True)
        size = len(batch[0]) // parts
        with engine:
            for k in range(parts):
                some = slice(k * size, (k + 1) * size)
                step(model, engine, [None if t is None else t[some] for t in batch], accumulate=parts)
        modules = [model, *engine.estimators.values()]
        found.append([p.grad for m in modules for p in m.parameters() if p.grad is not None])
    assert_close(found[1], found[0])


@each(LEARNED)
def test_only_what_learns_from_the_network_sees_it(row):
    """Another network above the last boundary: no bit of a local loss may differ."""
    found = []
    for seed in (0, 1):
        model, engine, batch = engine_for(row, estimator_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
        top = model[2].scores
        with torch.no_grad():
            top.weight.copy_(torch.randn(top.weight.shape, generator=torch.Generator().manual_seed(seed)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with engine:
            for _ in range(2):
                optimizer.zero_grad()
                step(model, engine, batch)
                optimizer.step()
                engine.update_estimators()
        found.append([t for e in engine.estimators.values() for t in e.state_dict().values()])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert same != row.learns_from_network


@each(ESTIMATORS)
def test_building_and_running_leaves_the_global_generator_alone(row):
    model, engine, batch = engine_for(row)
    before = torch.get_rng_state()
    with engine:
        step(model, engine, batch)
        engine.update_estimators()
    assert torch.equal(torch.get_rng_state(), before)


@each(ESTIMATORS)
def test_a_resumed_engine_goes_on_bit_for_bit(row):
    def go(engine, model, batch, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with engine:
            for _ in range(steps):
                optimizer.zero_grad()
                step(model, engine, batch)
                optimizer.step()
                engine.update_estimators()

    model, engine, batch = engine_for(row)
    go(engine, model, batch, 2)
    resumed_model, resumed, _ = engine_for(row)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(engine.state_dict()))
    go(engine, model, batch, 2)
    go(resumed, resumed_model, batch, 2)
    for name, estimator in engine.estimators.items():
        exact(dict(resumed.estimators[name].state_dict()), dict(estimator.state_dict()))
    exact(dict(resumed_model.state_dict()), dict(model.state_dict()))
