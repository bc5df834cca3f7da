"""Stages in turn, without processes, are one process at staleness 0, and what holds with any."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, VECTOR_ESTIMATORS, Told, mlp
from pipeline.staged import (
    OPTIMIZERS,
    TOLD,
    WAITING,
    WIDTHS,
    Blind,
    assert_same_bits,
    batches,
    loss_of,
    one_process,
    together,
    train_whole,
)
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import DirectFeedbackAlignmentEstimator, LinearEstimator
from lightning_dni.pipeline.together import StagesTogether


@pytest.mark.parametrize(
    ("stages", "bp_lambda", "name"),
    [
        *((3, bp_lambda, name) for bp_lambda in LAMBDAS for name in VECTOR_ESTIMATORS),
        *((stages, bp_lambda, "linear") for stages in (2, 4) for bp_lambda in LAMBDAS),
        (4, 0.0, "critic"),
        *((3, 0.0, name) for name in TOLD),
        (2, 0.0, "cascade"),
        (4, 0.0, "cascade"),
        (4, 0.5, "cascade"),
        (4, 0.0, "cascade over a critic"),
    ],
)
def test_without_lag_stages_are_one_process(stages, bp_lambda, name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[stages], dropout=0.2, batch_norm=True, dtype=torch.float32), batches()
    options = {"bp_lambda": bp_lambda}
    estimator = (VECTOR_ESTIMATORS | TOLD)[name]
    staged = together(model, estimator, data, **options)
    before = copy.deepcopy(model.state_dict())
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, estimator, data, **options)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)
    moved = [n for n, value in before.items() if not torch.equal(value, staged.state_dict()[n])]
    if name != "zero" or bp_lambda:
        assert {n.partition(".")[0] for n in moved} == {str(k) for k in range(stages)}


def test_what_is_drawn_before_the_stages_is_the_same_on_all_of_them():
    """As in diffusion: the noise that stage 0 gets is what the last stage compares with."""

    def noisy_loss(model, batch):
        noise = torch.randn(len(batch[0]), CLASSES)
        x = torch.cat([batch[0][:, CLASSES:], batch[0][:, :CLASSES] + noise], 1)
        return F.mse_loss(model(x), noise)

    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dropout=0.2, dtype=torch.float32), batches(20)
    options = {"loss_denominator": "elements", "seed": 3}
    estimator = partial(LinearEstimator)
    sgd = OPTIMIZERS["sgd"]
    staged = StagesTogether(model, ["0", "1"], estimator, noisy_loss, sgd, data[0], **options)
    losses = [staged.step([batch]) for batch in data]
    engine = DNIEngine(model, ["0", "1"], estimator, rng="stage", **options)
    expected = train_whole(engine, model, sgd(model.parameters()), data, noisy_loss)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"estimator_steps": 2},
        {"loss_denominator": "sum"},
        {"estimator_clip_norm": 0.1},
        {"on_nonfinite": "skip"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_without_lag_options_mean_the_same(options):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches()
    staged = together(model, VECTOR_ESTIMATORS["linear"], data, **options)
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, VECTOR_ESTIMATORS["linear"], data, **options)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)


def test_without_lag_accumulated_batches_are_the_same():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(30)
    staged = together(model, VECTOR_ESTIMATORS["linear"], data)
    for i in range(0, 30, 3):
        staged.step(data[i : i + 3])
    engine, _ = one_process(model, VECTOR_ESTIMATORS["linear"], data, accumulate=3)
    assert_same_bits(staged, engine, model)


@pytest.mark.parametrize("name", WAITING)
def test_estimators_that_are_told_first_are_those_of_one_process(name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dropout=0.2, dtype=torch.float32), batches(20)
    staged = together(model, WAITING[name], data)
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, WAITING[name], data)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("above", ["linear", "critic"])
def test_a_cascade_below_what_predicts_no_loss_is_refused(above, staleness):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(2)
    factories = {"0": TOLD["cascade"], "1": VECTOR_ESTIMATORS[above]}
    staged = together(model, factories, data, staleness)
    for batch in data[:staleness]:
        staged.step([batch])
    with pytest.raises(EstimatorError, match=r"above CriticCascade at boundary '0' .* it predicts nothing"):
        staged.step([data[staleness]])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_at_the_output_is_heard_with_a_lambda_and_accumulation_too(accumulate):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dropout=0.2, dtype=torch.float32), batches(12)
    options = {"bp_lambda": 0.3}
    staged = together(model, DirectFeedbackAlignmentEstimator, data, **options)
    for i in range(0, len(data), accumulate):
        staged.step(data[i : i + accumulate])
    engine, _ = one_process(model, DirectFeedbackAlignmentEstimator, data, accumulate=accumulate, **options)
    assert_same_bits(staged, engine, model)


def test_an_output_that_the_loss_uses_in_two_calls_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            h = self.below(x).relu()
            return self.head(h) + self.head(-h)

    torch.manual_seed(0)
    data = batches(1)
    made = (["below"], DirectFeedbackAlignmentEstimator, loss_of, OPTIMIZERS["sgd"], data[0])
    staged = StagesTogether(Twice(), *made, output="head", seed=3)
    with pytest.raises(EstimatorError, match=r"Expected one gradient at the network's output .* got 2"):
        staged.step(data)


@pytest.mark.parametrize("name", ["linear", "critic", "mlp", "cascade"])
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_saved_pipeline_goes_on_as_if_it_had_not_stopped(name, staleness):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dropout=0.2, dtype=torch.float32), batches(20)
    estimator = (VECTOR_ESTIMATORS | TOLD)[name]
    whole = together(model, estimator, data, staleness, "adam")
    first = together(model, estimator, data, staleness, "adam")
    for batch in data:
        whole.step([batch])
    for batch in data[:9]:
        first.step([batch])
    for engine in reversed(first.engines):
        engine.drain()
    second = together(model, estimator, data, staleness, "adam")
    for k, engine in enumerate(second.engines):
        second.models[k].load_state_dict(first.models[k].state_dict())
        second.optimizers[k].load_state_dict(first.optimizers[k].state_dict())
        engine.load_state_dict(copy.deepcopy(first.engines[k].state_dict()))
    for batch in data[9:]:
        second.step([batch])
    for name_, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name_]), name_


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_stage_that_passes_on_no_gradient_tells_the_stage_below(staleness, probe):
    """Whose estimator then hears that its target is zero, in every step, and nothing hangs."""
    torch.manual_seed(0)
    data = batches(8)
    model = nn.Sequential(nn.Linear(5, 6), Blind(), nn.Linear(7, CLASSES))
    told = partial(Told, rule=lambda h: torch.ones_like(h))
    staged = StagesTogether(model, ["0", "1"], told, loss_of, OPTIMIZERS["sgd"], data[0], staleness, seed=3)
    staged.models[1][1].blind = True
    for batch in data:
        for engine in staged.engines if probe else ():
            engine.request_probe()
        staged.step([batch])
    first = staged.engines[0]
    assert not torch.equal(staged.state_dict()["0.weight"], model.state_dict()["0.weight"])
    assert torch.equal(staged.state_dict()["1.map.weight"], model.state_dict()["1.map.weight"])
    assert not torch.equal(staged.state_dict()["2.weight"], model.state_dict()["2.weight"])
    assert len(first._inbox.pending) == staleness
    assert all(p.gradient is None or p.gradient.tensors == (None,) for p in first._inbox.pending)
