"""The contract: what an estimator says is all that the stages below get."""

import copy

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    MAP_ESTIMATORS,
    VECTOR_ESTIMATORS,
    Told,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
)
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import BoundarySpec, GradientEstimator, Lock, Record, Signal, sg_loss
from lightning_dni.core.estimator import rows_of
from lightning_dni.errors import EstimatorError

WIDTHS = (5, 6, 7, 6, CLASSES)


class Overheard(GradientEstimator):
    """Wraps an estimator and writes down what it said."""

    def __init__(self, spec, make, said):
        super().__init__()
        self.inner, self.said, self.name = make(spec), said, spec.name
        self.num_classes, self.context_size = self.inner.num_classes, self.inner.context_size
        self.needs, self.keeps_graph = self.inner.needs, self.inner.keeps_graph  # facts of the object here

    def synthesize(self, h, context, state):
        gradient, state = self.inner.synthesize(h, context, state)
        self.said[self.name] = None if gradient is None else gradient[0].detach().clone()
        return gradient, state

    def loss(self, record, feedback):
        return self.inner.loss(record, feedback)


def convolutional():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, CLASSES)),
    ).double()


def case(kind):
    """A net with estimators that have learnt for some steps, and a fresh batch."""
    maps = kind in MAP_ESTIMATORS
    model = convolutional() if maps else mlp(WIDTHS)
    make = {**VECTOR_ESTIMATORS, **MAP_ESTIMATORS}[kind]
    batch = lambda: (torch.randn(8, 2, 6, 6).double(), torch.randint(0, CLASSES, (8,))) if maps else blobs()
    said = {}
    boundaries = [str(k) for k in range(len(model) - 1)]
    engine = attached(model, boundaries, lambda spec: Overheard(spec, make, said))
    for _ in range(5):
        run_step(engine, model, batch())
        engine.update_estimators()
    model.zero_grad()
    return engine, model, said, batch()


@pytest.mark.parametrize("kind", [*VECTOR_ESTIMATORS, *MAP_ESTIMATORS])
def test_the_stages_below_get_what_the_estimator_said_and_nothing_else(kind):
    engine, model, said, (x, y) = case(kind)
    twin = copy.deepcopy(model)
    run_step(engine, model, (x, y))
    assert (kind == "zero") == (said["1"] is None)
    h = x
    for k, stage in enumerate(twin[:-1]):
        out = stage(h)
        if said[str(k)] is not None:
            assert said[str(k)].abs().max() > 0
            out.backward(said[str(k)] / 8)
        h = out.detach()
    F.cross_entropy(twin[-1](h), y).backward()
    assert_close(grads(model), grads(twin), atol=1e-15)


@pytest.mark.parametrize("kind", [*VECTOR_ESTIMATORS, *MAP_ESTIMATORS])
def test_another_loss_above_changes_nothing_below(kind):
    engine, model, _, batch = case(kind)
    found = []
    for factor in (1.0, -100.0):
        run_step(engine, model, batch, lambda out, y, factor=factor: factor * F.cross_entropy(out, y))
        found.append(grads(model[:-1]))
        model.zero_grad(), engine.drop_estimator_gradients()
    assert_close(*found, atol=0)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("kind", VECTOR_ESTIMATORS)
def test_estimators_get_no_gradient_from_the_loss(kind, bp_lambda):
    """Their gradient is that of their own loss on what they saw and were told."""
    model, (x, y) = mlp((5, 6, CLASSES)), blobs()
    engine = attached(model, ["0"], VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
    for _ in range(3):
        run_step(engine, model, (x, y))
        engine.update_estimators()
    estimator = engine.estimators["0"]
    twin = copy.deepcopy(estimator)
    run_step(engine, model, (x, y))
    h = model[0](x).detach().requires_grad_()
    out = model[1](h)
    F.cross_entropy(out, y, reduction="sum").backward()
    if twin.is_learned:
        from lightning_dni.core import Feedback

        gradient, state = twin.synthesize((h.detach(),), y, None)
        record = Record((h.detach(),), y, gradient, state)
        twin.loss(record, Feedback(target=(h.grad,), output=out.detach())).backward()
    assert_close(grads(estimator), grads(twin), atol=1e-13)


class Promoted(Told):
    """Writes down the precision it is run in."""

    seen: list

    def synthesize(self, h, context, state):
        product = h[0] @ h[0].T
        self.seen += [h[0].dtype, product.dtype]
        return (h[0].sin(),), None


class PromotedLearner(Promoted):
    needs = frozenset({Signal.TARGET})

    def __init__(self, spec):
        super().__init__(spec)
        self.map = nn.Linear(*spec.shape, *spec.shape)

    def synthesize(self, h, context, state):
        out = self.map(h[0])
        self.seen += [h[0].dtype, out.dtype]
        return (out,), None

    def loss(self, record, feedback):
        self.seen += [feedback.target[0].dtype, (record.h[0] @ record.h[0].T).dtype]
        return sg_loss(record.gradient, feedback.target)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("estimator", [Promoted, PromotedLearner])
def test_estimators_run_in_float32_under_autocast(estimator, bp_lambda):
    model, batch = mlp(dtype=torch.float32), blobs(dtype=torch.float32)
    estimator.seen, passed = [], []
    model[2].register_forward_pre_hook(lambda module, args: passed.append(args[0].dtype))
    engine = attached(model, ["0.0", "1.0"], estimator, bp_lambda=bp_lambda)
    with engine.training_step(batch), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    engine.backward(loss)
    assert passed == [torch.bfloat16]
    assert len(estimator.seen) >= 4
    assert set(estimator.seen) == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_estimators_take_the_precision_of_what_crosses_if_that_is_higher():
    model = mlp()
    engine = attached(model, ["0"], VECTOR_ESTIMATORS["mlp"])
    run_step(engine, model, blobs())
    assert {p.dtype for p in engine.estimators["0"].parameters()} == {torch.float64}


class Echo(GradientEstimator):
    """Waits for the target and hands it on."""

    needs = frozenset({Signal.TARGET})
    locks = frozenset({Lock.UPDATE})

    def __init__(self, spec):
        super().__init__()

    def synthesize(self, h, context, state):
        return tuple(torch.full_like(leaf, 7.0) for leaf in h), None

    def correct(self, record, feedback):
        return feedback.target


def test_a_locked_estimator_that_echoes_its_target_is_backprop():
    model, (x, y) = mlp(WIDTHS, dropout=0.3), blobs()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    run_step(attached(model, ["0", "1", "2"], Echo), model, (x, y))
    torch.manual_seed(1)
    F.cross_entropy(twin(x), y).backward()
    assert_close(grads(model), grads(twin), atol=0)  # eight rows: a power of two scales without rounding


def test_an_unlocked_estimator_is_not_asked_to_correct():
    class Hasty(Echo):
        locks = frozenset()

        def correct(self, record, feedback):
            raise AssertionError

    model = mlp()
    run_step(attached(model, ["0", "1"], Hasty), model, blobs())


def test_facts_about_learning():
    spec = BoundarySpec.of("b", [torch.zeros(8, 4)])
    made = {kind: make(spec) for kind, make in VECTOR_ESTIMATORS.items()}
    assert {k for k, e in made.items() if e.is_learned} == {"linear", "mlp", "local_loss", "critic"}
    assert {k for k, e in made.items() if e.learns_from_network} == {"linear", "mlp", "critic"}


def test_rows_are_counted_on_the_first_dimension():
    assert rows_of([torch.zeros(8, 4), torch.zeros(8)]) == 8


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


class Narrow(Locked):
    def correct(self, record, feedback):
        return (feedback.target[0][:, :1],)


class Unbounded(Locked):
    def correct(self, record, feedback):
        return (feedback.target[0] * float("nan"),)


@pytest.mark.parametrize(("estimator", "match"), [(Narrow, "one gradient per"), (Unbounded, "finite")])
def test_a_correction_is_checked_as_a_gradient_is(estimator, match):
    model = mlp()
    with pytest.raises(EstimatorError, match=f"{estimator.__name__} at boundary '0'.*{match}"):
        run_step(attached(model, ["0"], estimator), model, blobs())


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
