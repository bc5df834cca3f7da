"""Synthetic gradients at truncations: against loops written by hand, in double precision."""

import copy
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from core.recurrent import (
    BATCH,
    CORES,
    FEATURES,
    LENGTH,
    OUTPUTS,
    WIDTH,
    Net,
    Told,
    begin_anew,
    draw_chunks,
    engine_of,
    loss_of,
    rows_of_state,
    train,
    train_by_hand,
)
from fits import hooks_on
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from lightning_dni import MLPInputEstimator
from lightning_dni.core import DNIEngine, Exchange, GradientEstimator, Lock, Signal
from lightning_dni.errors import BoundaryError, EstimatorError, StageError
from lightning_dni.estimators import (
    BackpropEstimator,
    CriticEstimator,
    DelayedGradientEstimator,
    LinearEstimator,
    LocalLossEstimator,
    MLPEstimator,
    ZeroEstimator,
)

exactly = partial(assert_close, rtol=0, atol=0)
closely = partial(assert_close, rtol=1e-10, atol=1e-10)


def stirred(spec, seed=3):
    """A linear estimator that no longer says zero."""
    estimator = LinearEstimator(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in estimator.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return estimator


def stirred_weights(net):
    """What `stirred` begins with."""
    made = []
    engine = engine_of(net, lambda spec: made.append(stirred(spec)) or made[-1], truncations_of(net))
    with engine:
        train(net, engine, draw_chunks(1))
    return [p.detach().clone() for p in made[0].parameters()]


def truncations_of(net):
    return next(k for k, (make, *_) in CORES.items() if type(net.core) is getattr(make, "func", make))


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


def test_what_the_user_writes_into_the_state_is_no_longer_the_state_that_went_out():
    net = Net()
    engine = engine_of(net, stirred, sequence_end="ignore")

    def in_place(state):
        for s in state:
            s[:, 0] = 0.0
        return state

    with engine:
        assert lesson_weights(net, engine, draw_chunks(1)[0], in_place) == BATCH - 1


def test_no_state_and_a_batch_of_another_size_begin_anew():
    """Nothing is taught about what went before, or that nothing comes back to it."""
    net, (chunk, (x, y, _)) = Net(), draw_chunks(2)
    for sequence_end in ("ignore", "zero"):
        engine = engine_of(net, stirred, sequence_end=sequence_end)
        with engine:
            assert lesson_weights(net, engine, chunk, lambda state: None) == (
                None if sequence_end == "ignore" else BATCH
            )
            _, state = train(net, engine, [chunk], rate=0.0)
            engine.request_report()
            with engine.training_step():
                loss = loss_of(net(x[:, :3], tuple(s[:, :3] for s in state))[0], y[:, :3])
            engine.backward(loss)
        report = engine.last_report.boundaries.get("core")
        assert (report is None) == (sequence_end == "ignore")
        if report is not None:
            assert report.target.shape == report.synthetic.shape
            assert not report.target.any()
            assert report.synthetic.any()


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


def weights(engine):
    return [list(e.state_dict().values()) for e in engine.estimators.values()]


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
    closely(report.synthetic, said)  # as it was said, before damping
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


# ---- refusals


class Waits(GradientEstimator):
    """Has to be told first."""

    needs, locks = frozenset({Signal.TARGET}), frozenset({Lock.UPDATE})

    def synthesize(self, h, context, state):
        return None, None


@pytest.mark.parametrize(
    ("estimator", "why"),
    [
        (partial(CriticEstimator, num_classes=2), "needs ['network output']"),
        (partial(LocalLossEstimator, num_classes=2), "never hears of it"),
        (BackpropEstimator, "waits for it"),
        (DelayedGradientEstimator, "waits for it"),
        (lambda spec: Waits(), "waits for it"),
    ],
)
def test_an_estimator_that_cannot_learn_at_the_end_of_a_chunk_is_refused(estimator, why):
    net = Net("gru")
    engine = engine_of(net, estimator, "gru")
    with engine, pytest.raises(EstimatorError) as caught:
        train(net, engine, draw_chunks(1))
    assert "Expected an estimator that learns from the target gradient alone" in str(caught.value)
    assert why in str(caught.value)


class Forgets(Waits):
    """Learns from what it has said alone, which carries no graph here."""

    locks = frozenset()

    def __init__(self, spec):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def synthesize(self, h, context, state):
        return tuple(self.weight * leaf for leaf in h), None

    def loss(self, record, feedback):
        return record.gradient[0].square().mean()


def test_an_estimator_whose_loss_has_no_graph_is_refused():
    net = Net()
    engine = engine_of(net, Forgets)
    with engine, pytest.raises(EstimatorError, match="Expected the loss of Forgets at boundary 'core' to"):
        train(net, engine, draw_chunks(2))


class Odd(nn.Module):
    """Returns, and is given, what a truncation cannot use."""

    def __init__(self, returns, width=WIDTH):
        super().__init__()
        self.core = nn.Module()
        self.linear, self.returns = nn.Linear(FEATURES, width), returns
        self.core.forward = lambda x, state=None: self.returns(self.linear(x), state)

    def forward(self, x, state=None):
        return self.core(x, state)[0]


@pytest.mark.parametrize(
    ("returns", "match"),
    [
        (lambda h, state: [h, h], r"to return \(output, state\), but got list"),
        (lambda h, state: (h, h, h), r"to return \(output, state\), but got 3 values"),
        (lambda h, state: (h, h[None]), "whose batch dimension is known"),
        (lambda h, state: (h, h.sum(1)), "whose batch dimension is known"),
        (lambda h, state: (h, (h, h[:2])), "to have the same number of rows in dimension 0"),
    ],
)
def test_a_module_that_does_not_hand_on_a_state_is_refused(returns, match):
    model = Odd(returns)
    engine = DNIEngine(model, [], LinearEstimator, truncations=["core"])
    with engine, engine.training_step(), pytest.raises(BoundaryError, match=match):
        model(torch.zeros(BATCH, FEATURES))


def test_a_truncation_that_did_not_run_is_refused():
    net = Net()
    engine = engine_of(net, LinearEstimator)
    with engine:
        with engine.training_step():
            loss = net.head(torch.zeros(1, 2).double()).sum()
        with pytest.raises(BoundaryError, match="Expected every truncation to run"):
            engine.backward(loss)


def test_a_second_loss_through_a_chunk_is_refused():
    net, (chunk, _) = Net(), draw_chunks(2)
    engine = engine_of(net, LinearEstimator)
    with engine, engine.training_step(several_losses=True):
        out, _ = net(chunk[0])
        engine.backward(out.sum())
        with pytest.raises(BoundaryError, match="Expected one backward pass through each chunk"):
            engine.backward(out.mean())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"boundaries": ["head"]}, BoundaryError, "Expected `boundaries` or `truncations`, but got both"),
        ({"bp_lambda": 0.5}, EstimatorError, "Expected no `bp_lambda` with `truncations`"),
        (
            {"synthetic_inputs": MLPInputEstimator},
            EstimatorError,
            "Expected no `synthetic_inputs` with `truncations`",
        ),
        ({"update_probability": 0.5}, EstimatorError, "Expected no `update_probability` with"),
        ({"update": "immediate"}, EstimatorError, "Expected no `update` with `truncations`"),
        ({"exchange": Mock(spec=Exchange)}, StageError, "Expected no replicas with `truncations`"),
        ({"damping": 0.0}, EstimatorError, "Expected `damping` to be above 0 and up to 1, but got 0.0"),
        ({"truncations": ["cor"]}, BoundaryError, "Expected `truncations` to name .* Did you mean 'core'"),
    ],
)
def test_an_option_that_does_not_go_with_truncations_is_refused(options, error, match):
    given = {"boundaries": [], "truncations": ["core"], **options}
    with pytest.raises(error, match=match):
        DNIEngine(Net(), estimator=LinearEstimator, **given)


def test_a_bidirectional_module_is_refused():
    model = nn.Sequential(nn.LSTM(2, 2, bidirectional=True))
    with pytest.raises(BoundaryError, match="Expected a recurrent module that reads forward"):
        DNIEngine(model, [], LinearEstimator, truncations=["0"])
