"""Instruments see what the probe sees, and change no number of the run."""

import copy
import weakref

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, VECTOR_ESTIMATORS, attached, blobs, mlp, run_step, same_bits, weights
from oracles import plain_gradients
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine

WIDTHS = (5, 6, 7, CLASSES)
NAMES = ["0", "1"]
KINDS = {"0": VECTOR_ESTIMATORS["mlp"], "1": VECTOR_ESTIMATORS["linear"]}


class Differentiates:
    """Takes second derivatives of every stage, as a power iteration would."""

    def __init__(self):
        self.seen = {}

    def __call__(self, crossings):
        self.seen[crossings[0].boundary] = crossings
        (first, *_) = crossings
        u = [torch.ones_like(h, requires_grad=True) for h in first.outputs]
        down = torch.autograd.grad(first.outputs, first.variables, u, create_graph=True)
        up = torch.autograd.grad(down, u, [torch.ones_like(g) for g in down], retain_graph=True)
        return {"up": up[0], "twice": 2 * sum(g.sum() for g in down)}


def run(before, bp_lambda=0.0, steps=5):
    torch.manual_seed(1)
    model = mlp(WIDTHS, dropout=0.3, batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    engine, losses = DNIEngine(model, NAMES, KINDS, bp_lambda=bp_lambda), []
    with engine:
        for step in range(steps):
            optimizer.zero_grad()
            before(engine, step)
            losses.append(run_step(engine, model, blobs()))
            optimizer.step()
            engine.update_estimators()
    state = {f"{n}.{k}": t for n, e in engine.estimators.items() for k, t in weights(e).items()}
    return {**state, **weights(model), "rng": torch.get_rng_state(), "losses": torch.stack(losses)}, engine


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_instruments_change_no_bit_of_a_run(bp_lambda):
    instrument = Differentiates()
    plain, _ = run(lambda engine, step: None, bp_lambda)
    watched, engine = run(lambda engine, step: engine.request_probe(instrument), bp_lambda)
    assert same_bits(plain, watched)
    assert engine.last_report.boundaries["1"].measured[instrument].keys() == {"up", "twice"}


def test_instruments_are_shown_the_gradients_of_the_step_and_the_stage():
    torch.manual_seed(0)
    model, (x, y), instrument = mlp(WIDTHS), blobs(), Differentiates()
    engine = attached(model, NAMES, VECTOR_ESTIMATORS["linear"], bp_lambda=0.5)
    run_step(engine, model, (x, y))
    engine.update_estimators()
    model.zero_grad()
    twin = copy.deepcopy(model)
    engine.request_probe(instrument)
    run_step(engine, model, (x, y), lambda out, y: 4 * F.cross_entropy(out, y), scale=torch.tensor(4.0))
    _, true = plain_gradients(twin, x, lambda out: 4 * F.cross_entropy(out, y), NAMES)
    for name, report in engine.last_report.boundaries.items():
        (seen,) = instrument.seen[name]
        torch.testing.assert_close(seen.true[0], true[name], rtol=0, atol=1e-13)
        applied = torch.autograd.grad(twin[int(name)](x if name == "0" else twin[0](x)),
                                      list(twin[int(name)].parameters()), seen.applied[0])  # fmt: skip
        for found, p in zip(applied, model[int(name)].parameters(), strict=True):
            torch.testing.assert_close(found, p.grad, rtol=0, atol=1e-13)
        assert {id(v) for v in seen.variables} == {id(p) for p in model[int(name)].parameters()}
        assert torch.equal(seen.context, y)
        assert float(seen.scale) == 4.0
        said, _ = engine.estimators[name].synthesize(seen.h, seen.context, None)
        torch.testing.assert_close(said[0].detach(), report.synthetic, rtol=0, atol=1e-13)
        assert not any(t.requires_grad for t in report.measured[instrument].values())


def test_a_request_holds_for_one_step_and_every_instrument_runs_once_in_it():
    class Counts(Differentiates):
        calls = 0

        def __call__(self, crossings):
            self.calls += 1
            return super().__call__(crossings)

    model, one, other = mlp(WIDTHS), Counts(), Counts()
    engine = attached(model, NAMES, KINDS)
    for instrument in (one, other, one):
        engine.request_probe(instrument)
    run_step(engine, model, blobs())
    assert (one.calls, other.calls) == (2, 2)
    assert engine.last_report.boundaries["0"].measured.keys() == {one, other}
    engine.request_probe()
    run_step(engine, model, blobs())
    assert (one.calls, other.calls) == (2, 2)
    assert engine.last_report.boundaries["0"].measured == {}


def test_hooks_on_parameters_do_not_see_what_instruments_differentiate():
    model, calls = mlp(WIDTHS), []
    engine = attached(model, NAMES, VECTOR_ESTIMATORS["linear"], bp_lambda=1.0)
    model[0][0].weight.register_hook(lambda g: calls.append(g.clone()))
    engine.request_probe(Differentiates())
    run_step(engine, model, blobs())
    assert len(calls) == 1
    assert len(model[0][0].weight._backward_hooks) == 1


def test_crossings_of_a_module_called_twice_are_measured_together():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.head = mlp((5, 6, 4)), nn.Linear(4, CLASSES).double()

        def forward(self, x):
            return self.head(self.tower(x) * self.tower(-x))

    model, instrument, (x, y) = Siamese(), Differentiates(), blobs()
    engine = attached(model, ["tower.0"])
    engine.request_probe(instrument)
    run_step(engine, model, (x, y))
    first, second = instrument.seen["tower.0"]
    torch.testing.assert_close(first.h[0], model.tower[0](x).detach())
    torch.testing.assert_close(second.h[0], model.tower[0](-x).detach())


def test_no_graph_outlives_the_step():
    model, seen = mlp(WIDTHS), []
    for stage in model:
        stage.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    engine = attached(model, NAMES)

    def last(crossings):
        u = [torch.ones_like(h, requires_grad=True) for h in crossings[0].outputs]
        down = torch.autograd.grad(crossings[0].outputs, crossings[0].variables, u, create_graph=True)
        return {"down": down[0]}

    engine.request_probe(last)
    run_step(engine, model, blobs())
    assert all(ref() is None for ref in seen)
