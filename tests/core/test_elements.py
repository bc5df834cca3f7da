"""`loss_denominator="elements"` counts on an output of as many elements in each row as in the step before."""

from functools import partial

import pytest
import torch
from core.nets import assert_close, attached, grads, mlp, run_step, weights

from lightning_dni.core.settings import StepSettings
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import ControlVariateEstimator, LinearEstimator, ZeroEstimator


def trained(lengths, **options):
    """The weights after steps on sequences of these lengths, whose loss is a mean over all elements."""
    torch.manual_seed(0)
    model = mlp((5, 6, 4))
    given = {"loss_denominator": "elements", "estimator_optimizer": partial(torch.optim.SGD, lr=0.1)}
    engine = attached(model, ["0"], **{"estimator": LinearEstimator, **given, **options})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for length in lengths:
        optimizer.zero_grad()
        run_step(
            engine, model, (torch.randn(8, length, 5).double(), None), lambda out, y: out.square().mean()
        )
        optimizer.step()
        engine.update_estimators()
    return weights(model) | weights(engine.estimators["0"])


def test_an_output_of_another_size_is_refused_where_elements_are_counted():
    """The synthetic gradient was scaled for the sequences of the step before: five times too large, here."""
    expected = r"Expected 16 elements .* in each row .* but got 80: .* callable `loss_denominator`, such as"
    with pytest.raises(EstimatorError, match=expected):
        trained([4, 4, 20])
    trained([4, 4, 4])
    trained([4, 4, 20], loss_denominator=lambda batch, h: h.shape[0] * h.shape[1] * 4.0)


@pytest.mark.parametrize(
    "options",
    [
        {"bp_lambda": 1.0},
        {"bp_lambda": 0.5},
        {"estimator": ZeroEstimator},
        {"estimator": partial(LinearEstimator, prop_alpha=0.5)},
        {"estimator": partial(ControlVariateEstimator, fraction=0.5)},
    ],
    ids=str,
)
def test_what_waits_is_scaled_for_the_output_that_there_is(options):
    counted, told = (
        trained([4, 4, 20, 7], **options, **denominator)
        for denominator in ({}, {"loss_denominator": lambda batch, h: h.shape[0] * h.shape[1] * 4.0})
    )
    assert_close(counted, told)


def test_a_batch_without_rows_changes_no_count_of_elements():
    """The step after it took every row of the output for one element."""
    ends = []
    for rows in ([8, 8, 8], [8, 8, 0, 8]):
        torch.manual_seed(0)
        model = mlp((5, 6, 4))
        engine = attached(model, ["0"], LinearEstimator, loss_denominator="elements", seed=0)
        data = [torch.randn(n, 5).double() for n in (8, 8, 8)]
        for n in rows:
            model.zero_grad()
            x = data.pop(0) if n else torch.zeros(0, 5).double()
            run_step(engine, model, (x, None), lambda out, y: out.square().sum() / max(1, out.numel()))
            engine.update_estimators() if n else engine.drop_estimator_gradients()
        ends.append(grads(model))
    assert_close(*ends)


@pytest.mark.parametrize(
    ("found", "bp_lambda", "denominator", "refused"),
    [
        (9, 0.0, "elements", True),
        (9, 1.0, "elements", False),
        (9, 0.0, "batch", False),
        (8, 0.0, "elements", False),
        (0, 0.0, "elements", False),
        (None, 0.0, "elements", False),
    ],
)
def test_a_last_stage_refuses_it_for_those_below(found, bp_lambda, denominator, refused):
    settings = StepSettings(None, None, {"0": bp_lambda}, denominator, elements_per_row=8)
    if refused:
        with pytest.raises(EstimatorError, match=r"Expected 8 elements .* but got 9"):
            settings.refuse_miscount(found)
    else:
        settings.refuse_miscount(found)
