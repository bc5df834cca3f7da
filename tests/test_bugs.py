"""Bugs that were found once, each with what the user saw."""

import copy
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, mlp, run_step, same_bits, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_dni.core import DNIEngine
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


class FirstAndLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.tied, self.middle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.tied(self.middle(self.tied(x).tanh()).tanh())


def test_two_forwards_may_share_a_cast():
    """The last stage of one forward and the first of the next met in autocast's cache."""
    model, x = FirstAndLast(), torch.randn(8, 6)
    engine = attached(model, ["middle"], ZeroEstimator)
    with engine.training_step((x, None)), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean() + model(-x).float().square().mean()
    engine.backward(loss)
    assert model.tied.weight.grad.isfinite().all()


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


def test_a_frozen_estimator_may_mix():
    """Its loss had nothing to differentiate into, which only showed where a stage waits."""

    def make(spec):
        return MLPEstimator(spec, hidden_sizes=(4,)).requires_grad_(False)

    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    run_step(attached(model, ["0", "1"], make, bp_lambda=0.5), model, batch)
    run_step(attached(twin, ["0", "1"], ZeroEstimator, bp_lambda=0.5), twin, batch)
    assert_close(grads(model), grads(twin))


def test_a_batch_without_rows_is_a_batch():
    """Plain torch trains on it (a mixture of experts may get one); the scale was a division by zero."""
    model = mlp()
    batch = (torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.long))
    engine = attached(model, ["0"], LINEAR)
    run_step(engine, model, batch, lambda out, y: out.sum())
    assert all(not p.grad.any() for p in model.parameters())


def test_one_estimator_may_serve_two_boundaries_or_is_refused_by_us():
    """torch complained about parameter groups that the user had never made."""
    model, built = mlp((5, 6, 6, CLASSES)), []

    def shared(spec):
        built.extend([] if built else [LinearEstimator(spec)])
        return built[0]

    with suppress(EstimatorError):
        run_step(attached(model, ["0", "1"], shared), model, blobs())


def test_values_are_checked_where_the_loss_has_no_closed_form():
    """The check was left to the closed form, which a bfloat16 target does without."""
    model, (x, y) = mlp().float(), blobs(dtype=torch.float32)
    engine = attached(model, ["0", "1"], LINEAR)
    for poisoned in (False, True):
        if poisoned:
            torch.nn.init.constant_(engine.estimators["1"].map.bias, float("nan"))
        refused = (
            pytest.raises(EstimatorError, match="boundary '1' to give finite") if poisoned else nullcontext()
        )
        with refused:
            with engine.training_step((x, y)), torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            engine.backward(loss)


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
