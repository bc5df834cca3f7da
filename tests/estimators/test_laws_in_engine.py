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
    given,
    loss_of,
    network,
)
from torch.testing import assert_close

from lightning_dni.core import DNIEngine, Feedback, Signal


def engine_for(row, dtype=torch.float32, stirred=False, **options):
    """A network of the row's kind, an engine with the row's estimator twice, and a batch."""
    model, inputs = network(row, dtype)
    factory = (lambda spec: row.stirred()) if stirred else row.make
    engine = DNIEngine(model, ["0", "1"], factory, labels=1, **options)
    return model, engine, batch_for(row, inputs, dtype=dtype)


def leaves_of(value):
    return value if isinstance(value, tuple) else (value,)


def gradients_by_hand(row, model, twins, batch):
    """Gradients of the weights, where each stage is given what its estimator says of what came back to it."""
    names, context = list(twins), batch[1] if row.context != "none" else None
    runs, below = [], batch[0]
    for stage in model:
        runs.append(Run(stage, below))
        below = runs[-1].cut
    output, summed = runs[-1].outputs[0], loss_of(runs[-1].outputs[0], batch[2]) * len(batch[0])
    (error,) = torch.autograd.grad(summed, output, retain_graph=True)
    arriving, found = (error,), {}
    for k in reversed(range(len(runs))):
        for name, parameter in runs[k].stage.named_parameters():
            whole = f"{names[k] if k < len(names) else k}.{name}"
            found[whole] = None if arriving is None else runs[k].pull(arriving, parameter)[0] / len(batch[0])
        if k:
            twin = twins[names[k - 1]]
            target = runs[k].target(arriving, twin)
            told = Feedback(target=target, output=output.detach(), output_gradient=error)
            arriving = given(twin, tuple(h.detach() for h in leaves_of(runs[k - 1].cut)), context, told)
    return found


class Run:
    """One stage, run on what was cut below it, with what its layers have read and made."""

    def __init__(self, stage, below):
        self.stage, self.below, self.calls = stage, leaves_of(below), []
        layers = [(n, m) for n, m in stage.named_modules() if hasattr(m, "weight")]
        handles = [
            m.register_forward_hook(lambda m, args, z, n=n: self.calls.append((n, m, args[0], z)))
            for n, m in layers
        ]
        made = stage(below)
        for handle in handles:
            handle.remove()
        self.outputs = leaves_of(made)
        cut = tuple(h.detach().requires_grad_() for h in self.outputs)
        self.cut = cut if isinstance(made, tuple) else cut[0]

    def pull(self, arriving, *inputs, of=None):
        """What `inputs` are given by what arrives at the outputs (or at `of`)."""
        of = self.outputs if of is None else of
        return torch.autograd.grad(of, inputs, arriving, retain_graph=True, allow_unused=True)

    def target(self, arriving, twin):
        """What comes back to the cut below: under feedback alignment by way of each layer's fixed matrix."""
        arriving = tuple(map(torch.zeros_like, self.outputs)) if arriving is None else arriving
        if Signal.CONSUMER not in twin.needs:
            return self.pull(arriving, *self.below)
        total = [torch.zeros_like(h) for h in self.below]
        for name, layer, x, z in self.calls:
            (matrix,) = [m for n, m in twin.matrices.drawn.items() if n.endswith(f".{name}")]
            again = x.detach().requires_grad_()
            made = torch.func.functional_call(layer, {"weight": matrix}, (again,))
            (back,) = torch.autograd.grad(made, again, self.pull(arriving, z)[0])
            for h, more in zip(total, self.pull((back,), *self.below, of=(x,)), strict=True):
                h += more
        return tuple(total)


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


@each([row for row in ESTIMATORS if not row.late])
def test_nothing_but_the_synthetic_gradient_reaches_the_stage(row):
    """Nor, where the stage waits, anything but what the estimator makes of what it was told."""
    model, engine, batch = engine_for(row, torch.float64, stirred=True)
    with engine:
        step(model, engine, batch)
        model.zero_grad()
        twins = copy.deepcopy(engine.estimators)
        step(model, engine, batch)
    expected = gradients_by_hand(row, model, twins, batch)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name])


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


class Uncast(torch.nn.Module):
    """A module that runs in full precision whatever is around it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        with torch.autocast("cpu", enabled=False):
            return self.module(*args)


@each(LEARNED)
def test_what_it_learns_in_mixed_precision_is_not_rounded(row):
    """Boundaries that pass on the same to the bit, with autocast around them and without."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, inputs = network(row, torch.float32)
        model, batch = torch.nn.Sequential(*map(Uncast, model)), batch_for(row, inputs)
        engine = DNIEngine(model, ["0", "1"], lambda spec: row.stirred(), labels=1, seed=1)
        with engine:
            with engine.training_step(batch[:2]), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss_of(model(batch[0]), batch[2])
            engine.backward(loss)
        made = [p.grad for e in engine.estimators.values() for p in e.parameters()]
        found.append([torch.zeros(()) if g is None else g for g in made])
    assert any(g.any() for g in found[0])
    for without, within in zip(*found, strict=True):
        assert torch.equal(within, without)


@each([row for row in ESTIMATORS if not row.late])
def test_a_batch_without_rows_teaches_nothing(row):
    """Heads divided by the number of rows, and were said to have a target gradient that is not finite."""
    model, engine, batch = engine_for(row, stirred=True)
    empty = [None if part is None else part[:0] for part in batch]
    with engine:
        for x, context, classes in (batch, empty):
            model.zero_grad()
            with engine.training_step((x, context)):
                scores = model(x)
                loss = scores.sum() if not len(x) else loss_of(scores, classes)
            engine.backward(loss)
            if len(x):
                engine.drop_estimator_gradients()
    learnt = [p.grad for e in engine.estimators.values() for p in e.parameters()]
    assert not any(bool(g.any()) for g in [*learnt, *(p.grad for p in model.parameters())] if g is not None)
