"""Synthetic gradients at truncations: against loops written by hand, in double precision."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from core.recurrent import (
    BATCH,
    CORES,
    LENGTH,
    OUTPUTS,
    WIDTH,
    Net,
    Told,
    begin_anew,
    closely,
    draw_chunks,
    engine_of,
    exactly,
    loss_of,
    rows_of_state,
    stirred,
    stirred_weights,
    train,
    train_by_hand,
    weights,
)
from torch.utils import _pytree as pytree

from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import (
    LinearEstimator,
    ZeroEstimator,
)

# ---- the gradients


@pytest.mark.parametrize("options", [{}, {"damping": 0.3, "sequence_end": "ignore"}], ids=["zero", "ignore"])
@pytest.mark.parametrize("kind", CORES)
def test_the_gradients_are_those_of_a_loop_written_by_hand(kind, options):
    """Of the net and of the estimator, over chunks at whose start some sequences begin anew."""
    ours, twin, chunks = Net(kind), Net(kind), draw_chunks(6)
    weights = stirred_weights(Net(kind))
    expected = train_by_hand(twin, chunks, *weights, **options)
    engine = engine_of(ours, stirred, kind, **options)
    with engine:
        found, _ = train(ours, engine, chunks)
    assert [learnt is None for _, learnt in expected] == [True] + 5 * [False]
    closely(found, [(list(net), learnt and list(learnt)) for net, learnt in expected])
    closely(list(ours.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("kind", CORES)
def test_with_a_zero_estimator_it_is_truncated_backprop_to_the_bit(kind):
    ours, plain, chunks = Net(kind), Net(kind), draw_chunks(4)
    engine = engine_of(ours, ZeroEstimator, kind)
    with engine:
        train(ours, engine, chunks, detach=False)  # who does not detach gets no longer gradients
    optimizer, state = torch.optim.SGD(plain.parameters(), lr=0.1), None
    for x, y, anew in chunks:
        optimizer.zero_grad()
        out, state = plain(x, begin_anew(plain, state, anew))
        loss_of(out, y).backward()
        optimizer.step()
        state = pytree.tree_map(torch.Tensor.detach, state)
    exactly(list(ours.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("kind", CORES)
def test_with_the_true_future_gradient_two_chunks_are_backprop_through_both(kind):
    ours, whole = Net(kind), Net(kind)
    (x0, y0, _), (x1, y1, anew) = draw_chunks(2)
    out0, middle = whole(x0)
    out1, _ = whole(x1, begin_anew(whole, middle, anew))
    (loss_of(out0, y0) + loss_of(out1, y1)).backward()
    begin = pytree.tree_map(lambda s: s.detach().requires_grad_(), middle)
    out1, _ = whole(x1, begin_anew(whole, begin, anew))
    future = torch.autograd.grad(loss_of(out1, y1), pytree.tree_leaves(begin))
    leaves = [(g.movedim(1, 0).flatten(1) if ours.stacked else g) * BATCH for g in future]
    engine = engine_of(ours, partial(Told, says=[tuple(leaves), None]), kind)
    with engine:
        found, _ = train(ours, engine, [(x0, y0, None), (x1, y1, anew)], rate=0.0)
    summed = [a + b for a, b in zip(found[0][0], found[1][0], strict=True)]
    closely(summed, [p.grad for p in whole.parameters()])


def test_nothing_comes_back_from_the_next_chunk_but_what_the_estimator_says():
    """Whatever the next chunk's data and loss are, and whether or not the user detaches the state."""
    (first, second), (_, other) = draw_chunks(2), draw_chunks(2, seed=7)
    gradients = []
    for after, detach in [(second, True), (other, True), (second, False)]:
        net = Net()
        engine = engine_of(net, stirred)
        with engine:
            history, _ = train(net, engine, [first, after], rate=0.0, detach=detach)
        gradients.append(history)
    exactly(gradients[1][0], gradients[0][0])
    exactly(gradients[2], gradients[0])
    assert not torch.equal(gradients[1][1][0][0], gradients[0][1][0][0])


def test_an_initial_state_that_is_learnt_gets_its_gradient():
    """In the rows that begin with it; what the others had before stays apart."""
    net, chunks = Net("gru"), draw_chunks(2, resets=False)
    initial = torch.full((1, 1, WIDTH), 0.1, dtype=torch.float64, requires_grad=True)
    anew = torch.tensor([False, True, False, True]).view(1, -1, 1)

    def run(engine):
        initial.grad = state = None
        for x, y, _ in chunks:
            begin = initial.expand(1, BATCH, WIDTH)
            entered = begin if state is None else torch.where(anew, begin, state.detach())
            with nullcontext() if engine is None else engine.training_step((x, y)):
                out, state = net(x, entered)
                loss = loss_of(out, y)
            loss.backward() if engine is None else engine.backward(loss)
        return initial.grad

    engine = engine_of(net, LinearEstimator)
    with engine:
        found = run(engine)
        learnt = [p.grad.clone() for p in engine.estimators["core"].parameters()]
    closely(found, run(None))
    assert all(gradient.any() for gradient in learnt)


def test_a_state_that_is_not_detached_must_not_hide_a_learnt_one():
    net, (chunk, _) = Net("gru"), draw_chunks(2)
    initial = torch.zeros(1, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    engine = engine_of(net, LinearEstimator)
    with engine:
        _, state = train(net, engine, [chunk], detach=False)
        with (
            pytest.raises(BoundaryError, match="Expected the state that comes into truncation 'core' to be"),
            engine.training_step(),
        ):
            net(chunk[0], state + initial)


# ---- several chunks, several losses, accumulation, scaling


@pytest.mark.parametrize("kind", ["lstm", "user's cell"])
def test_chunks_in_one_step_are_those_of_a_step_each(kind):
    """One loss for both, or one after the other; the second goes on from the first."""
    (x0, y0, _), (x1, y1, anew) = draw_chunks(2)
    found = {}
    for way in ("step each", "one loss", "two losses"):
        net = Net(kind)
        engine = engine_of(net, stirred, kind)
        with engine:
            if way == "step each":
                state = None
                for x, y in ((x0, y0), (x1, y1)):
                    state = begin_anew(net, state, anew)
                    with engine.training_step():
                        out, state = net(x, state)
                        loss = loss_of(out, y)
                    engine.backward(loss)
            else:
                with engine.training_step(several_losses=way == "two losses"):
                    out, state = net(x0)
                    first = loss_of(out, y0)
                    if way == "two losses":
                        engine.backward(first)
                    detached = pytree.tree_map(torch.Tensor.detach, state)
                    out, state = net(x1, begin_anew(net, detached, anew))
                    second = loss_of(out, y1)
                    if way == "two losses":
                        engine.backward(second)
                if way == "one loss":
                    engine.backward(first + second)
        learnt = [p.grad.clone() for e in engine.estimators.values() for p in e.parameters()]
        found[way] = [p.grad.clone() for p in net.parameters()] + learnt
    exactly(found["two losses"], found["step each"])
    closely(found["one loss"], found["step each"])


def test_accumulated_and_scaled_losses_give_what_they_give_unscaled():
    """A loss that is halved and one that a gradient scaler multiplies, to the estimator the same loss."""
    chunks, found = draw_chunks(3), {}
    for accumulate, scale in [(1, 1.0), (2, 1.0), (2, 1024.0)]:
        net = Net()
        engine = engine_of(net, stirred, damping=0.5)
        state = None
        with engine:
            for x, y, anew in chunks:
                options = {"accumulate": accumulate, "scale": None if scale == 1.0 else torch.tensor(scale)}
                with engine.training_step((x, y), **options):
                    out, state = net(x, begin_anew(net, state, anew))
                    loss = loss_of(out, y) / accumulate
                scaled = engine.prepare_backward(loss)
                (scaled * scale).backward()
                engine.finish_backward()
        learnt = [p.grad for e in engine.estimators.values() for p in e.parameters()]
        found[accumulate, scale] = [p.grad * accumulate / scale for p in net.parameters()] + [
            g * accumulate for g in learnt
        ]
    closely(found[2, 1.0], found[1, 1.0])
    closely(found[2, 1024.0], found[1, 1.0])


@pytest.mark.parametrize("denominator", ["sum", "elements", lambda batch, h: float(batch[1].numel())])
def test_the_estimators_units_do_not_move_with_the_losses(denominator):
    """The same estimator says the same under a mean over rows, a sum and a mean over everything."""
    chunks = draw_chunks(3)
    size = {"sum": 1, "elements": BATCH * OUTPUTS * LENGTH}.get(denominator, BATCH * LENGTH * OUTPUTS)

    class Batched(Net):
        def forward(self, x, state=None):
            out, state = super().forward(x, state)
            return out.transpose(0, 1), state

    found = []
    for choice, share in (("batch", BATCH), (denominator, size)):
        net = Batched()
        engine = engine_of(net, LinearEstimator, loss_denominator=choice)
        state = None
        with engine:
            for x, y, anew in chunks:
                with engine.training_step((x, y)):
                    out, state = net(x, begin_anew(net, state, anew))
                    loss = (out - y.transpose(0, 1)).square().sum() / share
                engine.backward(loss)
                engine.update_estimators()
        found.append([p.grad * share for p in net.parameters()] + pytree.tree_leaves(weights(engine)))
    closely(found[1], found[0])


def test_the_estimator_takes_as_many_steps_as_asked_for():
    chunks, moved = draw_chunks(2, resets=False), []
    for steps in (1, 3):
        net = Net()
        engine = engine_of(net, stirred, estimator_steps=steps)
        with engine:
            train(net, engine, chunks, rate=0.0)
        moved.append(pytree.tree_leaves(weights(engine)))
    h, target = None, None
    net = Net()
    engine = engine_of(net, stirred, estimator_steps=1)
    with engine:
        _, state = train(net, engine, chunks[:1], rate=0.0)
        engine.request_report()
        train(net, engine, chunks[1:], rate=0.0, state=state)
        h, target = rows_of_state(net, state), engine.last_report.boundaries["core"].target
    matrix, bias = moved[0]
    for _ in range(2):
        error = h @ matrix.t() + bias - target
        matrix, bias = matrix - 0.2 * error.t() @ h / BATCH, bias - 0.2 * error.mean(0)
    closely(moved[1], [matrix, bias])
