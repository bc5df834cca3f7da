"""Laws of the estimator contract, each over every row of the table that it speaks of."""

import copy
from functools import partial

import pytest
import torch
from tables import (
    BATCH_NORM,
    CLASSES,
    ESTIMATORS,
    HEADS,
    LEARNED,
    POSITIONWISE,
    REGRESSORS,
    ROWWISE,
    Row,
    each,
    exact,
    given,
    gradients_of,
    lesson,
    linear,
    record_of,
    synthesize,
)
from torch import nn
from torch.testing import assert_close

from lightning_dni import estimators
from lightning_dni.core import GradientEstimator, Signal


def feedback_like(feedback, pick):
    """The same feedback for other rows."""
    return type(feedback)(
        target=tuple(pick(t) for t in feedback.target),
        output=pick(feedback.output),
        output_gradient=pick(feedback.output_gradient),
    )


# ---- the table


def test_every_public_estimator_has_a_row():
    covered = {type(row.build()) for row in ESTIMATORS}
    assert covered == {getattr(estimators, name) for name in estimators.__all__}
    assert len({row.id for row in ESTIMATORS}) == len(ESTIMATORS)


def test_the_table_notices_a_public_name_without_a_row(monkeypatch):
    monkeypatch.setattr(estimators, "__all__", [*estimators.__all__, "GradientEstimator"])
    monkeypatch.setattr(estimators, "GradientEstimator", GradientEstimator, raising=False)
    with pytest.raises(AssertionError):
        test_every_public_estimator_has_a_row()


@each(ESTIMATORS)
def test_declares_what_it_is(row):
    estimator = row.build()
    assert estimator.is_learned == row.learned
    assert estimator.learns_from_network == row.learns_from_network
    assert estimator.locks == row.locks
    options = row.make.keywords if isinstance(row.make, partial) else {}
    assert type(estimator).locks_with(**options) == row.locks
    assert (estimator.num_classes is not None) == row.context.endswith("labels")
    assert (estimator.context_size is not None) == row.context.endswith("vectors")


@each(ESTIMATORS)
def test_is_final(row):
    cls = type(row.build())
    assert cls.__mro__[1] is GradientEstimator
    assert cls.__final__


# ---- what it gives


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each(ESTIMATORS)
def test_keeps_shape_and_dtype(row, dtype):
    h, context, feedback = row.sample(dtype=dtype)
    gradient = given(row.stirred(dtype=dtype), h, context, feedback)
    if row.learned or row.locks or row.late:
        assert [(g.shape, g.dtype) for g in gradient] == [(leaf.shape, dtype) for leaf in h]
    else:
        assert gradient is None


@each([row for row in ESTIMATORS if row.starts_at_zero])
def test_starts_at_exactly_zero(row):
    h, context, _ = row.sample()
    for graph in (True, False):
        gradient = record_of(row.build(), h, context, graph).gradient
        assert gradient is None or all(torch.equal(g, torch.zeros_like(g)) for g in gradient)


@each(LEARNED)
def test_does_not_stay_at_zero(row):
    h, context, _ = row.sample()
    assert all(bool(g.any()) for g in synthesize(row.stirred(), h, context))


@each(ESTIMATORS)
def test_neither_changes_nor_aliases_what_it_is_shown(row):
    estimator, (h, context, feedback) = row.stirred(), row.sample()
    shown = [*h, *feedback.target, feedback.output, feedback.output_gradient]
    shown += [] if context is None else [context]
    before = [t.clone() for t in shown]
    record = record_of(estimator, h, context)
    loss = estimator.loss(record, feedback)
    if loss is not None:
        loss.backward()
    last = given(estimator, h, context, feedback) or ()
    exact(shown, before)
    own = {t.untyped_storage().data_ptr() for t in [*shown, *estimator.parameters()]}
    assert all(g.untyped_storage().data_ptr() not in own for g in record.gradient or ())
    if estimator.relays:
        exact(last, feedback.target)
    else:
        assert all(g.untyped_storage().data_ptr() not in own for g in last)


@each(ESTIMATORS)
def test_is_deterministic_and_draws_no_random_number(row):
    h, context, feedback = row.sample()
    results = []
    for _ in range(2):
        estimator, before = row.stirred(), torch.get_rng_state()
        record = record_of(estimator, h, context)
        loss = estimator.loss(record, feedback)
        assert torch.equal(torch.get_rng_state(), before)
        results.append([*(record.gradient or ()), *([] if loss is None else [loss])])
        results[-1] += given(estimator, h, context, feedback) or ()
        assert torch.equal(torch.get_rng_state(), before)
    exact(results[0], results[1])


@each(ESTIMATORS)
def test_state_dict_restores_it(row):
    h, context, feedback = row.sample()
    estimator, other = row.stirred(seed=1), row.build(seed=2)
    given(estimator, h, context, feedback)
    given(other, h, context, feedback)
    other.load_state_dict(estimator.state_dict())
    exact(given(other, h, context, feedback), given(estimator, h, context, feedback))
    state, restored = estimator.state_dict(), other.state_dict()
    exact(list(state.values()), list(restored.values()))


@each(ESTIMATORS)
def test_copies_are_independent(row):
    h, context, feedback = row.sample()
    estimator = row.stirred()
    twin, before = copy.deepcopy(estimator), given(estimator, h, context, feedback)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter.zero_()
    exact(given(twin, h, context, feedback), before)


@each(ESTIMATORS)
def test_accepts_any_batch_size(row):
    estimator = row.stirred()
    for batch in (4, 1, 7):
        h, context, feedback = row.sample(batch)
        record = record_of(estimator, h, context)
        loss = estimator.loss(record, feedback)
        for g, leaf in zip(given(estimator, h, context, feedback) or h, h, strict=True):
            assert g.shape == leaf.shape
            assert g.isfinite().all()
        assert loss is None or loss.isfinite()


# ---- rows and positions


@each(ROWWISE)
def test_a_row_depends_on_that_row_alone(row):
    estimator, (h, context, feedback) = row.stirred(), row.sample()
    whole = given(estimator, h, context, feedback)
    own = feedback_like(feedback, lambda t: t[2:3])
    alone = given(estimator, tuple(t[2:3] for t in h), None if context is None else context[2:3], own)
    if whole is not None:
        assert_close(alone, tuple(g[2:3] for g in whole))


@each(POSITIONWISE)
def test_a_position_depends_on_that_position_alone(row):
    estimator, (h, context, _) = row.stirred(), row.sample()
    whole = synthesize(estimator, h, context)
    permuted = torch.tensor([2, 0, 3, 1])
    if row.context.startswith("token"):
        context = context[:, permuted]
    moved = synthesize(estimator, (h[0][:, permuted],), context)
    assert_close(moved[0], whole[0][:, permuted])
    (changed,) = h
    changed = changed.clone()
    changed[:, permuted[0]] += 1.0
    after = synthesize(estimator, (changed,), row.sample()[1])
    others = [p for p in range(h[0].shape[1]) if p != permuted[0]]
    assert_close(after[0][:, others], whole[0][:, others])
    assert not torch.allclose(after[0][:, permuted[0]], whole[0][:, permuted[0]])


@each([row for row in HEADS if row.kind == "sequence" and not row.positionwise])
def test_one_label_for_a_whole_sequence_couples_its_positions(row):
    estimator, (h, context, _) = row.stirred(), row.sample()
    whole = synthesize(estimator, h, context)
    (changed,) = (t.clone() for t in h)
    changed[:, 0] += 1.0
    assert not torch.allclose(synthesize(estimator, (changed,), context)[0][:, 1:], whole[0][:, 1:])


@each([row for row in ESTIMATORS if row.kind == "sequence"])
def test_accepts_sequences_of_any_length(row):
    estimator, (h, context, feedback) = row.stirred(), row.sample()
    shorter = tuple(t[:, :2] for t in h)
    tokens = row.context.startswith("token")
    short = feedback_like(feedback, lambda t: t[:, :2] if tokens else t)
    short = short._replace(target=tuple(t[:, :2] for t in feedback.target))
    context = context[:, :2] if tokens else context
    assert given(estimator, shorter, context, short)[0].shape == shorter[0].shape
    loss = estimator.loss(record_of(estimator, shorter, context), short)
    assert loss is None or loss.isfinite()


@each([row for row in ESTIMATORS if row.kind == "map"])
def test_accepts_maps_of_any_size(row):
    estimator, (h, context, feedback) = row.stirred(), row.sample()
    larger = (torch.cat([h[0], h[0]], 2),)
    feedback = feedback._replace(target=larger)
    assert given(estimator, larger, context, feedback)[0].shape == larger[0].shape


@each(LEARNED)
def test_loss_is_a_mean_over_rows(row):
    """Batch norm too: the statistics of a doubled batch are those of the batch."""
    h, context, feedback = row.sample(dtype=torch.float64)
    loss, gradients = lesson(row.stirred(dtype=torch.float64), h, context, feedback)
    assert loss.shape == ()

    def doubled(t):
        return torch.cat([t, t])

    twice = lesson(
        row.stirred(dtype=torch.float64),
        tuple(doubled(t) for t in h),
        None if context is None else doubled(context),
        feedback_like(feedback, doubled),
    )
    assert_close(twice, (loss, gradients))


@each([row for row in ESTIMATORS if (row.learned or row.locks) and not row.chooses])
def test_synthetic_gradient_does_not_shrink_with_the_batch(row):
    h, context, feedback = row.sample()
    once = given(row.stirred(), h, context, feedback)
    twice = given(
        row.stirred(),
        tuple(torch.cat([t, t]) for t in h),
        None if context is None else torch.cat([context, context]),
        feedback_like(feedback, lambda t: torch.cat([t, t])),
    )
    assert_close(tuple(g[: len(h[0])] for g in twice), once)
    assert_close(tuple(g[len(h[0]) :] for g in twice), once)


# ---- what it learns


@each(LEARNED)
def test_loss_is_the_same_rebuilt(row):
    h, context, feedback = row.sample(dtype=torch.float64)
    kept = lesson(row.stirred(dtype=torch.float64), h, context, feedback, graph=True)
    rebuilt = lesson(row.stirred(dtype=torch.float64), h, context, feedback, graph=False)
    assert_close(kept, rebuilt, rtol=1e-12, atol=1e-12)


@each(LEARNED)
def test_loss_can_be_taken_several_times_from_one_record(row):
    h, context, feedback = row.sample()
    estimator = row.stirred()
    record = record_of(estimator, h, context, graph=False)
    losses = [estimator.loss(record, feedback) for _ in range(3)]
    gradients = [gradients_of(estimator, loss) for loss in losses]
    exact(losses[1:], losses[:-1])
    exact(gradients[1:], gradients[:-1])


@pytest.mark.parametrize("graph", [True, False])
@each(BATCH_NORM)
def test_running_averages_count_a_batch_once(row, graph):
    h, context, feedback = row.sample()
    estimator, once = row.stirred(), row.stirred()
    synthesize(once, h, context)
    before = dict(row.stirred().named_buffers())
    record = record_of(estimator, h, context, graph)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            estimator.loss(record, feedback)
    exact(dict(estimator.named_buffers()), dict(once.named_buffers()))
    assert all(not torch.equal(b, before[n]) for n, b in estimator.named_buffers())


@each(REGRESSORS)
def test_regressor_learns_the_squared_distance_to_its_target(row):
    h, context, feedback = row.sample(dtype=torch.float64)
    estimator, twin = row.stirred(dtype=torch.float64), row.stirred(dtype=torch.float64)
    prediction, _ = twin.synthesize(h, context, None)
    error = [(p - t).flatten(1) for p, t in zip(prediction, feedback.target, strict=True)]
    expected = torch.cat(error, 1).pow(2).sum(1).mean()
    loss, gradients = lesson(estimator, h, context, feedback)
    assert_close((loss, gradients), (expected.detach(), gradients_of(twin, expected)))


@each(REGRESSORS)
def test_regressor_weighs_rows(row):
    h, context, feedback = row.sample(dtype=torch.float64)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    weighed = type(feedback)(target=feedback.target, row_weights=weights)
    estimator, twin = row.stirred(dtype=torch.float64), row.stirred(dtype=torch.float64)
    prediction, _ = twin.synthesize(h, context, None)
    error = [(p - t).flatten(1).pow(2).sum(1) for p, t in zip(prediction, feedback.target, strict=True)]
    expected = (sum(error) * weights).mean()
    assert_close(lesson(estimator, h, context, weighed), (expected.detach(), gradients_of(twin, expected)))


@each(HEADS)
def test_head_gives_the_derivative_of_its_summed_loss(row):
    """Central differences of rows times the labels' mean loss."""
    h, context, _ = row.sample(dtype=torch.float64)
    estimator, eps = row.stirred(dtype=torch.float64), 1e-6
    (gradient,) = synthesize(estimator, h, context)
    labels_only = nn.functional.one_hot(context, CLASSES).double()
    if estimator.ignore_index is not None:
        labels_only[context == estimator.ignore_index] = 0.0

    def summed(h):
        scores = estimator.head(h, per_position=context.ndim > 1)
        return -(scores.log_softmax(-1) * labels_only).sum()

    direction = torch.randn(h[0].shape, dtype=torch.float64)
    slope = (summed(h[0] + eps * direction) - summed(h[0] - eps * direction)) / (2 * eps)
    assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=1e-8)


@each(ESTIMATORS)
def test_uses_only_what_it_asked_for(row):
    """A local loss is told nothing; a critic no target; a regressor no output."""
    h, context, feedback = row.sample()
    needs = row.build().needs
    told = type(feedback)(
        target=feedback.target if Signal.TARGET in needs else None,
        output=feedback.output if needs & {Signal.OUTPUT, Signal.ESTIMATOR_ABOVE} else None,
        output_gradient=feedback.output_gradient if Signal.OUTPUT_GRADIENT in needs else None,
    )
    exact(given(row.stirred(), h, context, told), given(row.stirred(), h, context, feedback))
    if row.learned:
        exact(lesson(row.stirred(), h, context, told), lesson(row.stirred(), h, context, feedback))


@each([row for row in REGRESSORS if row.build().differentiates])
def test_gradients_without_autograd_are_those_of_the_loss(row):
    h, context, feedback = row.sample(dtype=torch.float64)
    estimator = row.stirred(dtype=torch.float64)
    record = record_of(estimator, h, context, graph=False)
    derivative = tuple(g - t for g, t in zip(record.gradient, feedback.target, strict=True))
    found = estimator.parameter_gradients(record, derivative, 2.0 / len(h[0]))
    names = {p: n for n, p in estimator.named_parameters()}
    _, expected = lesson(estimator, h, context, feedback)
    assert_close({names[p]: g for p, g in found}, expected, rtol=1e-12, atol=1e-12)
    assert len(found) == len(expected)


def test_a_law_can_fail():
    """The leak and row laws are not vacuous: a row whose promise is false is caught."""
    coupled = next(row for row in ESTIMATORS if row.id == "mlp-labels")
    with pytest.raises(AssertionError):
        test_a_row_depends_on_that_row_alone(coupled)
    with pytest.raises(AssertionError):
        test_starts_at_exactly_zero(Row("one", _one))


def _one(spec):
    estimator = linear(spec)
    nn.init.ones_(estimator.map.bias)
    return estimator
