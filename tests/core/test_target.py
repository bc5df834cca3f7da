"""Scale, mixture and loss are the formulas they claim to be."""

import pytest
import torch
from core.nets import Told, assert_close, attached, blobs, grads, mlp, run_step, unchecked
from oracles import decoupled_backward
from torch.nn import functional as F

from lightning_dni.core import DNIEngine, GradientEstimator, mix_gradients, sg_loss
from lightning_dni.core.target import denominator
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator, ZeroEstimator

A, B = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def test_the_mixture_is_exact_at_its_ends():
    assert mix_gradients(A, B, 0.0) is A
    assert mix_gradients(A, B, 1.0) is B


def test_the_mixture_is_linear():
    torch.testing.assert_close(mix_gradients(A, B, 0.25), 0.75 * A + 0.25 * B, rtol=0, atol=1e-15)


def test_the_sg_loss_is_a_mean_over_rows_of_squared_distances():
    rows = [sum((A[i, j] - B[i, j]) ** 2 for j in range(3)) for i in range(4)]
    torch.testing.assert_close(sg_loss([A], [B]), sum(rows) / 4, rtol=0, atol=1e-14)


def test_the_sg_loss_adds_up_leaves():
    torch.testing.assert_close(sg_loss([A, B], [B, A]), 2 * sg_loss([A], [B]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("leaves", [1, 2])
def test_row_weights_weigh_rows(leaves):
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    expected = leaves * (((A - B) ** 2).sum(1) * weights).sum() / 4
    torch.testing.assert_close(sg_loss([A] * leaves, [B] * leaves, weights), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("choice", "expected"), [("batch", 8.0), ("sum", 1.0), ("elements", 32.0)])
def test_the_words_for_denominators(choice, expected):
    assert denominator(choice, None, None, 8, 4) == expected


def test_an_unknown_denominator_is_refused():
    with (
        unchecked(),
        pytest.raises(EstimatorError, match=r"one of \('batch', 'sum', 'elements'\).*got 'mean'"),
    ):
        DNIEngine(mlp(), ["0"], Told, loss_denominator="mean")


def row_mean(out, y):
    return F.mse_loss(out, y, reduction="sum") / len(out)


def per_sample_weighted(out, y):
    return F.mse_loss(out, y, reduction="sum") / 5


LOSSES = {
    "batch": ("batch", row_mean, 8),
    "sum": ("sum", lambda out, y: F.mse_loss(out, y, reduction="sum"), 1),
    "elements": ("elements", F.mse_loss, 32),
    "number": (lambda batch, h: 5.0, per_sample_weighted, 5),
    "tensor": (lambda batch, h: torch.tensor(5.0, dtype=torch.float64), per_sample_weighted, 5),
    "batch and h": (lambda batch, h: len(batch[0]) * h.shape[0] / 8, row_mean, 8),
}


def regression():
    return torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)


class FromZero(GradientEstimator):
    """Zero at first, as learned estimators are; then the cosine of h."""

    def __init__(self, spec):
        super().__init__()
        self.calls = 0

    def synthesize(self, h, context, state):
        self.calls += 1
        return tuple(leaf.cos() * (self.calls > 1) for leaf in h), None


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("case", LOSSES)
def test_synthetic_gradients_are_in_units_of_the_loss(case, bp_lambda):
    choice, loss_of, divisor = LOSSES[case]
    model, twin, (x, y) = mlp((5, 6, 7, 4)), mlp((5, 6, 7, 4)), regression()
    twin.load_state_dict(model.state_dict())
    engine = attached(model, ["0", "1"], FromZero, loss_denominator=choice, bp_lambda=bp_lambda)
    with engine.training_step((x, y)):  # "elements" needs to have seen an output
        model(x)
    run_step(engine, model, (x, y), loss_of)
    decoupled_backward(
        twin, x, lambda out: loss_of(out, y), [torch.cos, torch.cos], [bp_lambda] * 2, [divisor] * 2
    )
    assert_close(grads(model), grads(twin), atol=1e-13)


def sequences(length):
    return torch.randn(8, length, 5, dtype=torch.float64), torch.randn(8, length, 4, dtype=torch.float64)


def test_a_batch_without_rows_changes_no_count_of_elements():
    """It was refused for an output of no elements, and before that the next row was taken for one element."""
    model, (x, y) = mlp((5, 6, 7, 4)), sequences(3)
    engine = attached(model, ["0", "1"], FromZero, loss_denominator="elements")
    found = []
    for rows in (8, 8, 0, 8):
        model.zero_grad()
        run_step(engine, model, (x[:rows], y[:rows]), lambda out, y: (out - y).square().sum() / 96)
        found.append(grads(model))
    assert_close(found[3], found[1])


def test_elements_per_row_that_change_are_refused_where_a_gradient_was_divided_by_others():
    """As where sequences differ in length: the stage below had its gradient before the output was there."""
    model = mlp((5, 6, 7, 4))
    engine = attached(model, ["0", "1"], FromZero, loss_denominator="elements")
    for _ in range(2):
        run_step(engine, model, sequences(3), F.mse_loss)
    match = r"to have 12 elements per row .* but got 20 .* FromZero at boundary '0' had to say something"
    with pytest.raises(EstimatorError, match=match):
        run_step(engine, model, sequences(5), F.mse_loss)


@pytest.mark.parametrize("estimator", [LinearEstimator, ZeroEstimator])
@pytest.mark.parametrize("length", [3, 5])
def test_elements_per_row_that_change_are_right_where_the_gradient_waits_for_them(estimator, length):
    """With BP(lambda), and of course where no gradient is said."""
    bp_lambda = 0.5 if estimator is LinearEstimator else 0.0
    found = []
    for before in (length, 4):
        torch.manual_seed(1)
        model = mlp((5, 6, 7, 4))
        engine = attached(
            model, ["0", "1"], estimator, loss_denominator="elements", bp_lambda=bp_lambda, seed=0
        )
        with engine.training_step(sequences(before)):
            model(sequences(before)[0])
        torch.manual_seed(2)
        run_step(engine, model, sequences(length), F.mse_loss)
        learnt = {
            p: e.map.weight.grad for p, e in engine.estimators.items() if isinstance(e, LinearEstimator)
        }
        found.append(grads(model) | learnt)
    assert_close(found[1], found[0], atol=1e-13)


@pytest.mark.parametrize("case", LOSSES)
def test_targets_are_in_units_of_the_row(case):
    choice, loss_of, divisor = LOSSES[case]
    model, batch = mlp((5, 6, 4)), regression()
    engine = attached(model, ["0"], LinearEstimator, loss_denominator=choice)
    with engine.training_step(batch):
        model(batch[0])
    engine.request_report()
    run_step(engine, model, batch, loss_of)
    h = model[0](batch[0]).detach().requires_grad_()
    (loss_of(model[1](h), batch[1]) * divisor).backward()
    torch.testing.assert_close(engine.last_report.boundaries["0"].target, h.grad, rtol=0, atol=1e-13)


def test_a_batch_of_twice_the_size_tells_estimators_the_same():
    learnt = []
    model, (x, y) = mlp(), blobs()
    for batch in ((x, y), (x.repeat(2, 1), y.repeat(2))):
        engine = attached(model, ["0", "1"], LinearEstimator)
        run_step(engine, model, batch)
        learnt.append(engine.estimators["1"].map.weight.grad)
        engine.detach()
    assert learnt[0].abs().max() > 1e-3
    torch.testing.assert_close(*learnt, rtol=0, atol=1e-14)
