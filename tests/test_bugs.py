"""Bugs that were found once, each with what the user saw."""

import copy
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, mlp, run_step, same_bits, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_dni.core import DNIEngine, GradientEstimator, Lock, Signal, sg_loss
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import LinearEstimator, LocalLossEstimator, MLPEstimator, ZeroEstimator

LINEAR = partial(LinearEstimator, num_classes=CLASSES)


# ---- silent full backprop


@dataclass
class Wrapped:
    h: torch.Tensor


class Record(dict):
    pass


class Wrap(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(5, 6, dtype=torch.float64), kind

    def forward(self, x):
        h = self.layer(x)
        return Wrapped(h) if self.kind is Wrapped else Record(h=h)


class Unwrap(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, dtype=torch.float64)

    def forward(self, value):
        return self.layer(value.h if isinstance(value, Wrapped) else value["h"])


@pytest.mark.parametrize("kind", [Wrapped, Record])
def test_an_output_that_cannot_be_opened_is_refused_not_left_uncut(kind):
    """torch's pytree takes a dataclass or a dict subclass for one leaf: backprop went on unseen."""
    model = nn.Sequential(Wrap(kind), Unwrap())
    engine, batch = attached(model, ["0"], ZeroEstimator), blobs()
    with suppress(BoundaryError):
        run_step(engine, model, batch)
    assert model[0].layer.weight.grad is None


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True, dtype=torch.float64)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        return self.rnn(pack_padded_sequence(x, lengths, batch_first=True))[0]


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, dtype=torch.float64)

    def forward(self, packed):
        return self.layer(pad_packed_sequence(packed, batch_first=True)[0].mean(1))


def test_a_packed_sequence_is_cut_or_refused():
    model = nn.Sequential(Packed(), Unpacked())
    engine = attached(model, ["0"], ZeroEstimator)
    batch = (torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(0, CLASSES, (4,)))
    with suppress(BoundaryError):
        run_step(engine, model, batch)
    assert all(p.grad is None for p in model[0].parameters())


def test_a_forward_for_nothing_does_not_hide_a_boundary_that_did_not_run():
    """Boundaries were counted over the whole step: here '1' runs, but not on the way to the loss."""
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0", "1"], ZeroEstimator)
    with engine.training_step((x, y)):
        model(x)
        loss = F.cross_entropy(model[2](model[1].forward(model[0](x))), y)
    with pytest.raises(BoundaryError, match=r"\['1'\]"):
        engine.backward(loss)


# ---- autocast


def test_a_weight_used_in_two_stages_is_legal_under_autocast():
    """Autocast caches the cast of a weight, so both stages meet in one cast node."""
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(5, 6), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, CLASSES))
    engine, batch = attached(model, ["2", "4"], ZeroEstimator), blobs(dtype=torch.float32)
    with engine.training_step(batch), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    engine.backward(loss)
    assert shared.weight.grad is None


class FullPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float()).tanh()


def test_a_stage_is_differentiated_outside_autocast():
    """Autocast was on while a stage was differentiated in the forward pass: its float32 part lost bits."""
    model = nn.Sequential(FullPrecision(), nn.Linear(64, CLASSES))
    engine, batch = attached(model, ["0"]), blobs(32, 64, torch.float32)
    with engine.training_step(batch), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    engine.backward(loss)
    h = model[0](batch[0])
    expected = torch.autograd.grad(h, model[0].layer.weight, h.detach().sin() / 32)[0]
    torch.testing.assert_close(model[0].layer.weight.grad, expected, rtol=1e-5, atol=1e-6)


# ---- what estimators learn


def _twice(model, x, y, drop):
    loss = F.cross_entropy(model(x), y)
    if drop:
        model(x + 1.0)
    return loss


@pytest.mark.parametrize("estimator_steps", [1, 3])
@pytest.mark.parametrize("estimator", [LINEAR, partial(LocalLossEstimator, num_classes=CLASSES)])
def test_a_dropped_forward_teaches_nothing(estimator, estimator_steps):
    """With `estimator_steps` above one the further steps also used the forwards that had been dropped."""
    ends = []
    for drop in (False, True):
        torch.manual_seed(0)
        model, batches = mlp((5, 6, 7, 6, CLASSES)), [blobs() for _ in range(4)]
        engine = attached(model, ["0", "1", "2"], estimator, estimator_steps=estimator_steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            with engine.training_step((x, y)):
                loss = _twice(model, x, y, drop)
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
        ends.append({n: t for e in engine.estimators for n, t in weights(engine.estimators[e]).items()})
    assert same_bits(*ends)


def test_the_first_target_is_right_where_elements_are_counted():
    """loss_denominator='elements' is only known after the first forward pass; its target was too small."""
    learnt = []
    for warm in (False, True):
        torch.manual_seed(0)
        model = mlp((5, 6, 4))
        engine = attached(
            model, ["0"], LinearEstimator, loss_denominator="elements", estimator_optimizer=torch.optim.SGD
        )
        x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
        if warm:
            with engine.training_step((x, y)):
                model(x)
        run_step(engine, model, (x, y), F.mse_loss)
        learnt.append(grads(engine.estimators["0"]))
    assert_close(*learnt)


def test_unseen_output_is_named_where_elements_are_counted():
    """The message blamed the estimator's start, when in truth no output had ever been seen."""
    model = mlp((5, 6, 4))
    engine = attached(model, ["0"], LinearEstimator, loss_denominator="elements")
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)

    def steps():
        for _ in range(3):
            with engine.training_step((x, y)):
                loss = F.mse_loss(model[1](model[0](x)), y)
            engine.backward(loss)
            engine.update_estimators()

    with pytest.raises(EstimatorError, match="output="):
        steps()


def test_a_context_with_a_graph_gets_no_gradient_of_ours():
    """A continuous context that required grad received the derivative of the SG loss."""
    model, (x, y) = mlp(), blobs()
    context = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    engine = attached(
        model, ["0", "1"], partial(LinearEstimator, context_size=4), labels=lambda batch: context
    )
    for _ in range(3):
        run_step(engine, model, (x, y))
        engine.update_estimators()
    assert context.grad is None


def test_labels_of_another_number_of_rows_are_refused():
    """One label for eight rows was broadcast."""
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0"], LINEAR, labels=lambda batch: batch[1][:1])
    with pytest.raises(EstimatorError, match="8"):
        run_step(engine, model, (x, y))


def test_a_scalar_context_is_refused_by_name():
    model, (x, y) = mlp(), blobs()
    engine = attached(
        model, ["0"], partial(LinearEstimator, context_size=1), labels=lambda batch: torch.tensor(0.5)
    )
    with pytest.raises(EstimatorError, match="context"):
        run_step(engine, model, (x, y))


class Towers(nn.Module):
    """Two cuts whose gradients autograd leaves in the same memory."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv1d(1, 2, 1).double(), nn.Conv1d(1, 2, 1).double()

    def forward(self, x):
        return self.left(x).flatten(1) + self.right(x).flatten(1)


@pytest.mark.parametrize("report", [False, True])
def test_targets_that_share_memory_are_scaled_once(report):
    """The gradients at two boundaries were one buffer, which each of them scaled in place."""
    model, x = Towers(), torch.randn(4, 1, 3, dtype=torch.float64)
    engine = attached(model, ["left", "right"], LinearEstimator)
    if report:
        engine.request_report()
    with engine.training_step((x, None)):
        loss = model(x).square().sum() / len(x)
    engine.backward(loss)
    target = 2 * model(x).view(4, 2, 3)
    for name in ("left", "right"):
        expected = -2 * target.sum((0, 1)) / 4  # d/dC of the mean squared distance of 0 to the target
        torch.testing.assert_close(engine.estimators[name].map.bias.grad, expected, rtol=1e-12, atol=1e-12)


# ---- the contract


class Locked(GradientEstimator):
    """Waits, and then hands on what it is told to."""

    needs = frozenset({Signal.TARGET})
    locks = frozenset({Lock.UPDATE})

    def __init__(self, spec):
        super().__init__()

    def synthesize(self, h, context, state):
        return tuple(torch.zeros_like(leaf) for leaf in h), None

    def correct(self, record, feedback):
        return feedback.target


class Silent(Locked):
    def synthesize(self, h, context, state):
        return None, None

    def correct(self, record, feedback):
        return None


class BackwardLocked(Locked):
    locks = frozenset({Lock.BACKWARD})


class OutputLocked(Locked):
    needs = frozenset({Signal.OUTPUT})

    def correct(self, record, feedback):
        return tuple(torch.ones_like(h) * feedback.output.sum() for h in record.h)


class NeedsNothing(Locked):
    needs = frozenset()

    def correct(self, record, feedback):
        return tuple(torch.ones_like(h) for h in record.h)


def test_a_locked_estimator_may_say_nothing():
    model, batch = mlp(), blobs()
    run_step(attached(model, ["0", "1"], Silent), model, batch)
    assert all(p.grad is None or not p.grad.any() for p in model[:2].parameters())


def test_a_backward_locked_estimator_is_waited_for():
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0", "1"], BackwardLocked), model, batch)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    assert_close(grads(model), grads(twin))


@pytest.mark.parametrize("estimator", [OutputLocked, NeedsNothing])
def test_correct_is_asked_whatever_was_needed(estimator):
    """Feedback other than the target used up the record, and `correct` was never asked."""
    model, (x, y) = mlp((5, 6, CLASSES)), blobs()
    run_step(attached(model, ["0"], estimator), model, (x, y))
    h = model[0](x)
    told = model(x).sum().item() if estimator is OutputLocked else 1.0
    expected = torch.autograd.grad(h, model[0][0].weight, torch.full_like(h, told) / 8)[0]
    torch.testing.assert_close(model[0][0].weight.grad, expected, rtol=1e-12, atol=1e-12)


class Noisy(GradientEstimator):
    needs = frozenset({Signal.TARGET})
    stochastic = True

    def __init__(self, spec):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def synthesize(self, h, context, state):
        return tuple(torch.rand_like(leaf) * self.scale for leaf in h), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


def test_a_stochastic_estimator_has_a_stream_of_its_own():
    model, batch = mlp(), blobs()
    engine, before = attached(model, ["0", "1"], Noisy), torch.get_rng_state()
    run_step(engine, model, batch)
    assert torch.equal(torch.get_rng_state(), before)


# ---- reports


def test_weights_reported_for_a_module_that_ran_twice_are_counted_once():
    """The report summed gradients after the merge had already added one to the other in place."""
    reported = {}
    for probe in (True, False):
        torch.manual_seed(0)
        model, (x, y) = mlp(), blobs()
        engine = attached(model, ["0", "1"])
        if probe:
            engine.request_probe()
        with engine.training_step((x, y)):
            loss = F.cross_entropy(model(x) + model(x * 2), y)
        engine.backward(loss)
        if probe:
            for boundary in engine.last_report.boundaries.values():
                reported.update(boundary.applied_weights)
    assert_close(dict(reported), {n: g for n, g in grads(model).items() if n in reported})


def test_a_report_does_not_change_with_the_gradients_it_reports():
    """Clipping after backward rewrote the report, which shared memory with `.grad`."""
    model, batch = mlp(), blobs()
    engine = attached(model, ["0", "1"])
    engine.request_probe()
    run_step(engine, model, batch)
    before = {
        n: t.clone() for b in engine.last_report.boundaries.values() for n, t in b.applied_weights.items()
    }
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    after = {n: t for b in engine.last_report.boundaries.values() for n, t in b.applied_weights.items()}
    assert same_bits(before, after)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True, dtype=torch.float64)

    def forward(self, x):
        return self.rnn(x)


class FromState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, dtype=torch.float64)

    def forward(self, value):
        return self.layer(value[0][:, -1] + value[1][0][-1])


@pytest.mark.parametrize("request_", ["request_report", "request_probe"])
def test_leaves_of_different_row_counts_can_be_reported(request_):
    """nn.LSTM returns [batch, ...] beside [layers, batch, ...]: training ran, a monitor made it crash."""
    model = nn.Sequential(LastState(), FromState())
    engine = attached(model, ["0"])
    batch = (torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(0, CLASSES, (4,)))
    getattr(engine, request_)()
    run_step(engine, model, batch)
    assert engine.last_report.boundaries["0"].target is not None


def test_a_boundary_that_runs_at_two_sizes_can_be_reported():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Flatten(2)).double()
    engine = attached(model, ["0"])
    engine.request_probe()
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    with engine.training_step((x, None)):
        loss = model(x).square().sum() + model(x[..., ::2]).square().sum()
    engine.backward(loss)
    assert engine.last_report.boundaries["0"].true is not None


# ---- state


def test_a_saved_seed_is_used_for_estimators_that_are_yet_to_be_built():
    model, batch = mlp(), blobs()
    first = DNIEngine(model, ["0"], partial(MLPEstimator, hidden_sizes=(8,)), seed=1)
    second = DNIEngine(model, ["0"], partial(MLPEstimator, hidden_sizes=(8,)), seed=2)
    second.load_state_dict(first.state_dict())
    for engine in (first, second):
        with engine:
            run_step(engine, model, batch)
    assert same_bits(weights(first.estimators["0"]), weights(second.estimators["0"]))


def test_a_state_without_one_of_the_boundaries_is_refused_for_that():
    """Resuming with a boundary more complained about a pattern in `bp_lambda`."""
    model, batch = mlp(), blobs()
    saved = DNIEngine(model, ["0"], LINEAR)
    with saved:
        run_step(saved, model, batch)
    with pytest.raises(BoundaryError, match="`boundaries`"):
        DNIEngine(model, ["0", "1"], LINEAR).load_state_dict(saved.state_dict())


def _trained_in_order(names):
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(4, 4, dtype=torch.float64) for n in "ab"})
    engine = DNIEngine(model, ["a", "b"], LinearEstimator)
    x = torch.randn(8, 4, dtype=torch.float64)
    with engine:
        for _ in range(2):
            with engine.training_step((x, None)):
                loss = sum((i + 1) * model[n](x).square().sum() for i, n in enumerate(names))
            engine.backward(loss)
            engine.update_estimators()
    return engine


def test_optimizer_state_follows_its_boundary_not_its_place():
    """An engine that had built its estimators in another order loaded each other's moments."""
    saved, other = _trained_in_order("ab"), _trained_in_order("ba")
    other.load_state_dict(saved.state_dict())

    def moments(engine):
        (optimizer,) = engine._pool.optimizers
        return {
            n: optimizer.state[engine.estimators[n].map.weight]["exp_avg"].clone()
            for n in sorted(engine.estimators)
        }

    assert same_bits(moments(saved), moments(other))


def test_a_state_with_fewer_estimators_starts_the_others_afresh():
    """torch refused the optimizer's state; the learning rate finder restores such a one."""
    model, batch = mlp(), blobs()
    engine = DNIEngine(model, ["0", "1"], LINEAR)
    start = engine.state_dict()
    with engine:
        run_step(engine, model, batch)
        engine.update_estimators()
        engine.load_state_dict(start)
        assert engine.estimators == {}
        run_step(engine, model, batch)
    assert not any(p.any() for e in engine.estimators.values() for p in e.parameters())


# ---- gradients that meet


def test_a_sparse_gradient_may_meet_a_dense_one():
    """`.grad` was sparse from the last stage when the stage below handed in a dense gradient."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 6, sparse=True)
            self.below = nn.Linear(6, 6)

        def forward(self, ids):
            h = self.below(self.table.weight[ids])
            return (self.table(ids) * h).sum(1)

    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    engine, ids = attached(model, ["below"], bp_lambda=1.0), torch.tensor([0, 1, 1, 5])
    run_step(engine, model, (ids, None), lambda out, _: out.sum())
    twin(ids).sum().backward()
    torch.testing.assert_close(model.table.weight.grad.to_dense(), twin.table.weight.grad.to_dense())


# ---- messages


def test_a_name_that_looks_like_a_pattern_can_be_named():
    """'a[0]' was read as a pattern only, and cut 'a0' instead."""
    model = nn.ModuleDict({"a[0]": nn.Linear(1, 1), "a0": nn.Linear(1, 1)})
    assert DNIEngine(model, ["a[0]"], Told).boundaries == ("a[0]",)


def test_an_in_place_error_of_the_users_own_is_not_ours():
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0"])
    with pytest.raises(RuntimeError, match="leaf Variable") as caught, engine.training_step((x, y)):
        x.requires_grad_().add_(1.0)
    assert not isinstance(caught.value, BoundaryError)


def test_accumulate_below_one_is_refused():
    model, batch = mlp(), blobs()
    with pytest.raises(EstimatorError, match="accumulate"):
        run_step(attached(model, ["0"]), model, batch, accumulate=0)
