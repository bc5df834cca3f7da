"""RecurrentEstimator over the chunks of sequences, against a loop written by hand in double precision."""

import copy
from functools import partial

import pytest
import torch
from core.recurrent import (
    BATCH,
    Net,
    begin_anew,
    draw_chunks,
    engine_of,
    loss_of,
    rows_of_state,
    train,
)
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from lightning_dni.core import BoundarySpec, DNIEngine, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import RecurrentEstimator

closely = partial(assert_close, rtol=1e-10, atol=1e-10)
WIDTH = 10  # of the state of an "lstm" side by side


def stirred(spec, future_weight=0.0):
    estimator = RecurrentEstimator(spec, hidden_size=4, future_weight=future_weight)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in estimator.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return estimator


def gru(weights, h, memory):
    """One step of a GRU on ReLU(h W + b), in formulas."""
    x = torch.relu(h @ weights["read.weight"].t() + weights["read.bias"])
    inputs = (x @ weights["cell.weight_ih"].t() + weights["cell.bias_ih"]).chunk(3, 1)
    hidden = (memory @ weights["cell.weight_hh"].t() + weights["cell.bias_hh"]).chunk(3, 1)
    reset, update = torch.sigmoid(inputs[0] + hidden[0]), torch.sigmoid(inputs[1] + hidden[1])
    new = torch.tanh(inputs[2] + reset * hidden[2])
    return (1 - update) * new + update * memory


def read_out(weights, name, memory):
    return memory @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]


def train_by_hand(net, chunks, weights, future_weight, rate=0.1):
    """As `core.recurrent.train_by_hand`, with an estimator that has a memory."""
    weights = {n: w.clone().requires_grad_() for n, w in weights.items()}
    parameters, state, before, history = list(net.parameters()), None, None, []
    memory = torch.zeros(BATCH, 4).double()
    for x, y, anew in chunks:
        state = begin_anew(net, state, anew)
        goes_on = torch.ones(BATCH, 1).double() if anew is None else (~anew).double().unsqueeze(1)
        memory = memory * goes_on
        entered = None
        if state is not None:
            entered = pytree.tree_map(lambda s: s.detach().clone().requires_grad_(), state)
        out, left = net(x, entered)
        h = rows_of_state(net, left)
        after = gru(weights, h.detach(), memory).detach()
        said = read_out(weights, "head", after).detach()
        total = loss_of(out, y) + (said * h).sum() / BATCH
        inputs = [] if entered is None else pytree.tree_leaves(entered)
        found = torch.autograd.grad(total, [*parameters, *inputs])
        learnt = None
        if before is not None:
            target = rows_of_state(net, found[len(parameters) :]) * BATCH * goes_on
            again = gru(weights, *before)
            error = (read_out(weights, "head", again) - target).square().sum()
            if future_weight:
                ahead = read_out(weights, "future", again) - said * goes_on
                error = error + future_weight * ahead.square().sum()
            learnt = torch.autograd.grad(error / BATCH, list(weights.values()))
        history.append((found[: len(parameters)], learnt))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=False):
                parameter -= rate * gradient
            for weight, gradient in zip(weights.values(), learnt or (), strict=False):
                weight -= rate * gradient
        before, memory = (h.detach(), memory), after
        state = pytree.tree_map(lambda s: s.detach().clone(), left)
    return history


@pytest.mark.parametrize("future_weight", [0.0, 0.7])
def test_the_gradients_are_those_of_a_loop_written_by_hand(future_weight):
    """Of the net and the estimator, auxiliary task included, with sequences that begin anew."""
    ours, twin, chunks = Net(), Net(), draw_chunks(6)
    spec = BoundarySpec("core", (LeafSpec((WIDTH,), torch.float64),))
    weights = {n: w.double() for n, w in stirred(spec, future_weight).state_dict().items()}
    expected = train_by_hand(twin, chunks, weights, future_weight)
    engine = engine_of(ours, partial(stirred, future_weight=future_weight))
    with engine:
        found, _ = train(ours, engine, chunks)
    closely(found, [(list(net), learnt and list(learnt)) for net, learnt in expected])


def test_its_memory_goes_on_after_a_restart():
    straight, stopped, chunks = Net(), Net(), draw_chunks(6)
    make = partial(stirred, future_weight=0.5)
    whole, first, second = engine_of(straight, make), engine_of(stopped, make), engine_of(stopped, make)
    with whole:
        train(straight, whole, chunks)
    with first:
        _, state = train(stopped, first, chunks[:3])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with second:
        train(stopped, second, chunks[3:], state=state)
    assert_close(list(stopped.parameters()), list(straight.parameters()), rtol=0, atol=0)


def test_a_future_at_a_boundary_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    engine = DNIEngine(model, ["0"], partial(RecurrentEstimator, future_weight=1.0))
    with engine:
        with engine.training_step():
            loss = model(torch.ones(2, 2)).sum()
        with pytest.raises(
            EstimatorError, match="Expected a truncation for RecurrentEstimator at boundary '0'"
        ):
            engine.backward(loss)


@pytest.mark.parametrize(
    ("options", "match"), [({"hidden_size": 0}, "hidden_size"), ({"future_weight": -1.0}, "future_weight")]
)
def test_an_option_out_of_its_range_is_refused(options, match):
    with pytest.raises(EstimatorError, match=f"Expected `{match}` to be"):
        RecurrentEstimator(BoundarySpec("core", (LeafSpec((3,), torch.float32),)), **options)
