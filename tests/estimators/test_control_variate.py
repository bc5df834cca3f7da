"""ControlVariateEstimator: exact where every row is chosen, unbiased where some are (claim 30)."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, attached, blobs, grads, mlp, run_step
from oracles import plain_gradients
from tables import ESTIMATORS, each, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    ControlVariateEstimator,
    ConvEstimator,
    CriticEstimator,
    LinearEstimator,
    ZeroEstimator,
)

ROWS = [row for row in ESTIMATORS if row.id.startswith("control_variate")]
SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))
BOUNDARIES = ["0", "1"]


def engine_with(model, make):
    """An attached engine whose estimators give something else than zero."""
    engine = attached(model, BOUNDARIES, make)
    batch = blobs()
    run_step(engine, model, batch)
    generator = torch.Generator().manual_seed(1)
    for estimator in engine.estimators.values():
        for p in estimator.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    model.zero_grad()
    return engine, batch


@each(ROWS)
def test_adds_what_chosen_rows_are_short_of(row):
    """m of b rows move b/m of the way from the prediction to the target; the others stay."""
    estimator = row.stirred(dtype=torch.float64)
    seen = set()
    for _ in range(20):
        h, context, feedback = row.sample(dtype=torch.float64)
        record = record_of(estimator, h, context, graph=False)
        combined = estimator.correct(record, feedback)
        moved = [k for k in range(6) if not torch.equal(combined[0][k], record.gradient[0][k])]
        assert len(moved) == 3
        seen.add(tuple(moved))
        for c, s, t in zip(combined, record.gradient, feedback.target, strict=True):
            expected = s.clone()
            for k in moved:
                expected[k] = s[k] + 2.0 * (t[k] - s[k])
            assert_close(c, expected, rtol=0, atol=1e-10)
    assert len(seen) > 5


def assert_as_backprop(engine, model, batch):
    """One more step gives the gradients of backprop, to 1e-10; the engine is detached then."""
    run_step(engine, model, batch)
    combined = grads(model)
    engine.detach()
    model.zero_grad()
    plain_gradients(model, batch[0], lambda scores: F.cross_entropy(scores, batch[1]), BOUNDARIES)
    for name, gradient in grads(model).items():
        assert_close(combined[name], gradient, rtol=0, atol=1e-10)


def test_with_every_row_it_is_backprop():
    """Through two boundaries, whatever the predictions are."""
    torch.manual_seed(0)
    model = mlp()
    engine, (x, y) = engine_with(model, lambda spec: ControlVariateEstimator(spec, 1.0, CLASSES))
    assert_as_backprop(engine, model, (x, y))


def scores_of_bias(make, steps):
    """Deviations of the mean gradient of the lowest weights from backprop's, in standard errors."""
    torch.manual_seed(0)
    model = mlp()
    engine, (x, y) = engine_with(model, make)
    found = []
    for _ in range(steps):  # weights and estimators stand still
        model.zero_grad()
        run_step(engine, model, (x, y))
        found.append(model[0][0].weight.grad.flatten().clone())
    engine.detach()
    model.zero_grad()
    plain_gradients(model, x, lambda scores: F.cross_entropy(scores, y), BOUNDARIES)
    true, found = model[0][0].weight.grad.flatten(), torch.stack(found)
    spread = found.std(0) / steps**0.5
    return (found.mean(0) - true) / spread.clamp(min=1e-12)


def test_its_mean_is_the_full_gradient():
    """With fixed weights, over many choices and two boundaries, within the standard error."""
    z = scores_of_bias(lambda spec: ControlVariateEstimator(spec, 0.5, CLASSES), steps=150)
    assert z.square().mean().sqrt() < 1.5
    assert z.abs().max() < 4.0


def test_predictions_alone_are_biased():
    """What the law above would say of them: the test can fail."""
    z = scores_of_bias(lambda spec: LinearEstimator(spec, CLASSES), steps=3)
    assert z.abs().max() > 1e3


def test_a_good_prediction_leaves_less_variance_than_none():
    """With the target itself as prediction nothing is left, with zero all of it."""
    h, y, feedback = ROWS[0].sample(dtype=torch.float64)
    estimator = ROWS[0].build(dtype=torch.float64)
    spreads = []
    for prediction in (torch.zeros_like(h[0]), feedback.target[0]):
        record = record_of(estimator, h, y, graph=False)._replace(gradient=(prediction,))
        made = [estimator.correct(record, feedback)[0].sum(0) for _ in range(50)]
        spreads.append(float(torch.stack(made).std(0).max()))
    assert spreads[1] < 1e-12 < 0.1 < spreads[0]


def test_one_row_is_always_chosen():
    estimator = ControlVariateEstimator(SPEC, fraction=0.01)
    record = record_of(estimator, (torch.randn(4, 5),), None, graph=False)
    target = torch.ones(4, 5)
    (combined,) = estimator.correct(record, Feedback(target=(target,)))
    assert sorted(combined.sum(1).tolist()) == [0.0, 0.0, 0.0, 20.0]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_refuses_a_share_out_of_range(fraction):
    with pytest.raises(EstimatorError, match="`fraction` to be above 0 and at most 1, but got"):
        ControlVariateEstimator(SPEC, fraction=fraction)


def maps():
    """Two blocks of convolutions and a classifier."""
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.Tanh()) for a, b in ((1, 3), (3, 2))]
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(2 * 16, CLASSES))).double()


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_with_every_row_convolutional_predictions_are_backprop_too(hidden):
    torch.manual_seed(0)
    model, x, y = maps(), torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % CLASSES
    predictor = partial(ConvEstimator, hidden_channels=hidden, kernel_size=3, num_classes=CLASSES)
    engine = attached(model, BOUNDARIES, lambda spec: ControlVariateEstimator(spec, 1.0, predictor=predictor))
    run_step(engine, model, (x, y))
    for estimator in engine.estimators.values():
        assert isinstance(estimator.predictor, ConvEstimator)
        assert estimator.num_classes == CLASSES
        for p in estimator.parameters():
            p.data += 0.3 * torch.randn_like(p)
    model.zero_grad()
    assert_as_backprop(engine, model, (x, y))


def test_the_predictor_learns_as_it_does_by_itself():
    """The same loss and gradients as those of the estimator that predicts."""
    (row,) = (row for row in ROWS if row.id == "control_variate-map")
    mixed = row.stirred(dtype=torch.float64)
    h, context, feedback = row.sample(dtype=torch.float64)
    losses = [e.loss(record_of(e, h, context), feedback) for e in (mixed, mixed.predictor)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": LinearEstimator, "num_classes": CLASSES}, "among the options of `predictor`"),
        ({"predictor": LinearEstimator, "context_size": 2}, "among the options of `predictor`"),
        ({"predictor": ZeroEstimator}, "regresses the gradient, .*but got ZeroEstimator at boundary 'net.1'"),
        ({"predictor": partial(CriticEstimator, num_classes=3)}, "but got CriticEstimator"),
        ({"predictor": lambda spec: nn.Linear(5, 5)}, "but got Linear at"),
        ({"predictor": partial(LinearEstimator, prop_alpha=0.5)}, "wait for nothing, .*prop_alpha"),
    ],
)
def test_refuses_a_predictor_that_would_be_passed_over(options, message):
    with pytest.raises(EstimatorError, match=message):
        ControlVariateEstimator(SPEC, **options)
