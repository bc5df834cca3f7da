"""Which sequences go on at a truncation; what is saved, reported and left behind."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from core.recurrent import (
    BATCH,
    WIDTH,
    Net,
    Told,
    closely,
    draw_chunks,
    engine_of,
    exactly,
    loss_of,
    rows_of_state,
    stirred,
    stirred_weights,
    train,
    weights,
)
from fits import hooks_on
from torch import nn
from torch.utils import _pytree as pytree

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator, MLPEstimator, RecurrentEstimator

# ---- which rows go on


def lesson_weights(net, engine, first, enter):
    """Which rows of the chunk `first` have a target, when `enter(state)` is what the next one begins with."""
    _, state = train(net, engine, [first], rate=0.0)
    engine.request_report()
    with engine.training_step():
        out, _ = net(first[0], enter(state))
        loss = out.square().mean()
    engine.backward(loss)
    report = engine.last_report.boundaries.get("core")
    return None if report is None else len(report.synthetic)


@pytest.mark.parametrize(
    ("enter", "rows"),
    [
        (lambda state: state, BATCH),
        (lambda state: tuple(s.clone() for s in state), BATCH),
        (lambda state: tuple(s * torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, -1, 1) for s in state), 2),
        (lambda state: (state[0], state[1] + 1e-9), 0),
        (lambda state: tuple(s.flip(1) for s in state), 0),
        (lambda state: tuple(torch.zeros_like(s) for s in state), 0),
    ],
    ids=["kept", "copied", "reset in part", "another c", "permuted", "reset"],
)
def test_a_row_goes_on_where_its_state_comes_in_as_it_went_out(enter, rows):
    net = Net()
    engine = engine_of(net, stirred, sequence_end="ignore")
    with engine:
        assert lesson_weights(net, engine, draw_chunks(1)[0], enter) == rows


def test_a_dict_may_come_back_with_its_keys_in_another_order():
    chunks, found = draw_chunks(4), []
    for turned in (False, True):
        net = Net("user's cell")

        def forward(x, state=None, net=net, turned=turned):
            begin = dict(reversed(state.items())) if turned and state is not None else state
            return Net.forward(net, x, begin)

        net.forward = forward
        engine = engine_of(net, stirred, "user's cell")
        with engine:
            found.append((train(net, engine, chunks)[0], weights(engine)))
    exactly(found[1], found[0])


class Wrapper(nn.Module):
    """Hands everything on, under no name of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "call",
    [
        lambda core, x, state: core(x, state),
        lambda core, x, state: core(x, hx=state),
        lambda core, x, state: core(input=x, hx=state),
    ],
)
def test_a_state_is_found_by_place_where_the_argument_has_no_name(call):
    net = Net()
    net.core = Wrapper(net.core)
    net.forward = lambda x, state=None: (net.head((made := call(net.core, x, state))[0]), made[1])
    engine = DNIEngine(net, [], stirred, truncations={"core": 1}, sequence_end="ignore")
    with engine:
        assert lesson_weights(net, engine, draw_chunks(1)[0], lambda state: state) == BATCH


def test_what_the_user_writes_into_the_state_is_no_longer_the_state_that_went_out():
    net = Net()
    engine = engine_of(net, stirred, sequence_end="ignore")

    def in_place(state):
        for s in state:
            s[:, 0] = 0.0
        return state

    with engine:
        assert lesson_weights(net, engine, draw_chunks(1)[0], in_place) == BATCH - 1


@pytest.mark.parametrize(
    "begin", [lambda state: None, lambda state: tuple(s[:, :3] for s in state)], ids=["none", "fewer"]
)
@pytest.mark.parametrize("sequence_end", ["ignore", "zero"])
def test_no_state_and_a_batch_of_another_size_begin_anew(sequence_end, begin):
    """Nothing is taught about what went before, or that nothing comes back to it; nothing is compared."""
    net, (first, (x, y, _)) = Net(), draw_chunks(2)
    engine = engine_of(net, stirred, sequence_end=sequence_end)
    with engine:
        _, state = train(net, engine, [first], rate=0.0)
        begun = begin(state)
        rows = BATCH if begun is None else begun[0].shape[1]
        engine.request_report()
        with engine.training_step():
            loss = loss_of(net(x[:, :rows], begun)[0], y[:, :rows])
        engine.backward(loss)
    (matrix, bias), h = stirred_weights(Net()), rows_of_state(net, state)
    said = h @ matrix.t() + bias
    learnt = [p.grad for p in engine.estimators["core"].parameters()]
    if sequence_end == "ignore":
        assert learnt == [None, None]
    else:
        closely(learnt, [2 * said.t() @ h / BATCH, 2 * said.mean(0)])
    report = engine.last_report.boundaries.get("core")
    assert report is None or len(report.target) == len(report.synthetic) == 0


def test_forward_passes_of_other_kinds_change_nothing():
    """Evaluation, and one with gradients that no loss comes back through."""
    (first, second), runs = draw_chunks(2, resets=False), []
    for disturbed in (False, True):
        net = Net()
        engine = engine_of(net, stirred)
        with engine:
            _, state = train(net, engine, [first])
            if disturbed:
                with torch.no_grad():
                    net(second[0], state)
                net(first[0])
            engine.request_report()
            with engine.training_step():
                if disturbed:
                    net(first[0], state), net(first[0])
                out, _ = net(second[0], state)
                loss = loss_of(out, second[1])
            engine.backward(loss)
            engine.update_estimators()
        assert len(engine.last_report.boundaries["core"].target) == BATCH
        runs.append(
            [*net.parameters(), *(p.grad for p in net.parameters()), *pytree.tree_leaves(weights(engine))]
        )
    exactly(runs[1], runs[0])


@pytest.mark.parametrize("kind", [LinearEstimator, RecurrentEstimator])
def test_labels_that_are_written_over_by_the_next_batch_are_those_of_their_own(kind):
    """As in a loader with buffers of its own: the estimator learns only once the next chunk is there."""
    labels, found = torch.randint(5, (4, BATCH)), []
    for reuses in (False, True):
        net, state, buffer = Net(), None, torch.empty(BATCH, dtype=torch.int64)
        engine = engine_of(net, partial(kind, num_classes=5), seed=0, labels=1)
        with engine:
            for (x, y, _), label in zip(draw_chunks(4), labels, strict=True):
                with engine.training_step((x, buffer.copy_(label) if reuses else label)):
                    out, state = net(x, state)
                    loss = loss_of(out, y)
                engine.backward(loss)
                engine.update_estimators()
        found.append(weights(engine))
    exactly(found[1], found[0])


def test_two_sequences_that_are_read_in_turn_are_told_apart():
    net, (a, b, *_), rows = Net(), draw_chunks(4, resets=False), []
    engine = engine_of(net, stirred)
    states = [None, None]
    with engine:
        for order in ([0, 1], [1, 0], [0, 1]):
            engine.request_report()
            loss = torch.zeros((), dtype=torch.float64)
            with engine.training_step():
                for k in order:
                    out, states[k] = net((a, b)[k][0], states[k])
                    loss = loss + loss_of(out, (a, b)[k][1])
            engine.backward(loss)
            learnt = engine.last_report.boundaries
            rows.append(len(learnt["core"].target) if learnt else 0)
    assert rows == [0, 2 * BATCH, 2 * BATCH]


# ---- what is saved, reported and left behind


def test_a_run_that_goes_on_from_a_saved_state_is_the_run_that_was_not_stopped():
    chunks = draw_chunks(5)
    make = partial(MLPEstimator, hidden_sizes=(4,))
    straight, stopped = Net(), Net()
    options = {"estimator_optimizer": partial(torch.optim.Adam, lr=1e-2), "seed": 0}
    whole, first = engine_of(straight, make, **options), engine_of(stopped, make, **options)
    with whole:
        train(straight, whole, chunks)
    with first:
        _, state = train(stopped, first, chunks[:3])
    saved = copy.deepcopy(first.state_dict())
    second = engine_of(stopped, make, **options)
    second.load_state_dict(saved)
    with second:
        train(stopped, second, chunks[3:], state=state)
    exactly(list(stopped.parameters()), list(straight.parameters()))
    exactly(weights(second), weights(whole))


def test_the_report_compares_what_was_said_with_what_came_back():
    net, chunks = Net(), draw_chunks(2)
    engine = engine_of(net, stirred, damping=0.25)
    with engine:
        _, state = train(net, engine, chunks[:1], rate=0.0)
        engine.request_probe()
        train(net, engine, chunks[1:], rate=0.0, state=state)
    report = engine.last_report.boundaries["core"]
    assert report.true is None
    closely(report.loss, (report.synthetic - report.target).square().sum(1).mean())
    estimator = stirred_weights(Net())
    said = rows_of_state(net, state) @ estimator[0].t() + estimator[1]
    closely(report.synthetic, said[~chunks[1][2]])  # as it was said, before damping
    assert engine.describe()["damping"] == {"core": 0.25}


def test_hooks_are_gone_after_the_run_and_asleep_outside_of_it():
    net, (chunk, *_) = Net(), draw_chunks(2)
    engine = engine_of(net, stirred)
    before = hooks_on(net)
    with engine:
        train(net, engine, [chunk])
        twin = copy.deepcopy(net)
        out, state = twin(chunk[0], net(chunk[0])[1])
        assert out.grad_fn is not None
        assert not any(s.is_leaf for s in state)
    assert hooks_on(net) == before


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_synthetic_gradient_that_is_not_finite_is_named_or_skipped(on_nonfinite):
    (first, second), found = draw_chunks(2, resets=False), []
    for says in [(torch.full((BATCH, WIDTH), float("nan")),), None]:
        net = Net("gru")
        engine = engine_of(net, partial(Told, says=[says, None]), on_nonfinite=on_nonfinite)
        with engine:
            if says is not None and on_nonfinite == "raise":
                with pytest.raises(EstimatorError, match="Expected Told at boundary 'core' to give finite"):
                    train(net, engine, [first])
                return
            found.append(train(net, engine, [first, second])[0])
            assert engine.skipped == {"core": int(says is not None)}
    exactly(found[0], found[1])


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_target_that_is_not_finite_is_named_or_skipped(on_nonfinite):
    net, (first, (x, _, _)) = Net(), draw_chunks(2, resets=False)
    engine = engine_of(net, stirred, on_nonfinite=on_nonfinite)
    with engine:
        _, state = train(net, engine, [first])
        with engine.training_step():
            loss = (0 * net(x, state)[0]).sqrt().sum()  # zero, with a derivative that is no number
        with (
            pytest.raises(EstimatorError, match="Expected a finite target")
            if on_nonfinite == "raise"
            else nullcontext()
        ):
            engine.backward(loss)
        engine.update_estimators()
        if on_nonfinite == "skip":
            assert engine.skipped == {"core": 1}
            exactly(weights(engine)[0], stirred_weights(Net()))
