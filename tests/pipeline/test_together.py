"""The stages, without processes: at staleness 0 they are one process, at staleness D a loop with that lag."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, VECTOR_ESTIMATORS, Told, blobs, mlp
from oracles import mlp_stages
from pipeline.lagged import NaiveLaggedCascade, NaiveLaggedDNI
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine, Signal
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    BackpropEstimator,
    ControlVariateEstimator,
    CriticCascade,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
    LowRankEstimator,
    MLPEstimator,
    SobolevEstimator,
)
from lightning_dni.pipeline.together import StagesTogether

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-2),
}
WIDTHS = {2: (5, 6, CLASSES), 3: (5, 6, 7, CLASSES), 4: (5, 6, 7, 6, CLASSES)}


TOLD = {
    "sobolev": partial(SobolevEstimator, num_classes=CLASSES, hidden_sizes=(8,)),
    "low rank": partial(LowRankEstimator, rank=2, num_classes=CLASSES),
    "control variate": partial(ControlVariateEstimator, fraction=0.5, num_classes=CLASSES),
    "cascade": partial(CriticCascade, num_classes=CLASSES, hidden_sizes=(8,)),
    "cascade over a critic": {
        "0": VECTOR_ESTIMATORS["critic"],
        "*": lambda spec: CriticCascade(spec, num_classes=CLASSES),
    },
}
"""What hears several things, or has more to be restored than its weights."""


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(steps=50, dtype=torch.float32):
    """Every fifth is a partial one."""
    torch.manual_seed(1)
    return [blobs(rows=8 if i % 5 else 3, dtype=dtype) for i in range(steps)]


def together(model, estimator, data, staleness=0, optimizer="sgd", **options):
    boundaries = [str(k) for k in range(len(model) - 1)]
    return StagesTogether(
        model, boundaries, estimator, loss_of, OPTIMIZERS[optimizer], data[0], staleness, seed=3, **options
    )


def one_process(model, estimator, data, optimizer="sgd", accumulate=1, **options):
    boundaries = [str(k) for k in range(len(model) - 1)]
    engine = DNIEngine(model, boundaries, estimator, rng="stage", seed=3, **options)
    user, losses = OPTIMIZERS[optimizer](model.parameters()), []
    with engine:
        for i in range(0, len(data), accumulate):
            user.zero_grad()
            for batch in data[i : i + accumulate]:
                with engine.training_step(batch, accumulate=accumulate):
                    loss = loss_of(model, batch) / accumulate
                engine.backward(loss)
                losses.append(loss.detach() * accumulate)
            user.step()
            engine.update_estimators()
    return engine, losses


def assert_same_bits(stages, engine, model):
    """The whole model, and every estimator with its buffers."""
    for name, value in stages.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    estimators = {n: e for each in stages.engines for n, e in each.estimators.items()}
    assert estimators.keys() == engine.estimators.keys()
    for name, estimator in estimators.items():
        for key, value in estimator.state_dict().items():
            assert torch.equal(value, engine.estimators[name].state_dict()[key]), (name, key)


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
    engine, user, expected = DNIEngine(model, ["0", "1"], estimator, rng="stage", **options), None, []
    user = sgd(model.parameters())
    with engine:
        for batch in data:
            user.zero_grad()
            with engine.training_step(batch):
                loss = noisy_loss(model, batch)
            engine.backward(loss)
            user.step()
            engine.update_estimators()
            expected.append(loss.detach())
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


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_with_lag_stages_are_the_loop_with_that_lag(staleness):
    torch.manual_seed(0)
    model = mlp_stages((5, 6, 7, 6), CLASSES, batch_norm=True)
    data = batches(dtype=torch.float64)
    naive = NaiveLaggedDNI(copy.deepcopy(model), (6, 7, 6), CLASSES, staleness)
    staged = together(
        model,
        partial(LinearEstimator, num_classes=CLASSES),
        data,
        staleness,
        estimator_optimizer=partial(torch.optim.SGD, lr=0.05),
    )
    user = OPTIMIZERS["sgd"](naive.stages.parameters())
    for batch in data:
        loss = staged.step([batch])
        user.zero_grad()
        expected = naive.gradients(*batch)
        user.step()
        naive.update()
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for name, value in staged.state_dict().items():
        torch.testing.assert_close(value, naive.stages.state_dict()[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_with_lag_a_cascade_is_the_loop_with_that_lag(staleness):
    torch.manual_seed(0)
    model, data = mlp_stages((5, 6, 7, 6), CLASSES, batch_norm=True), batches(dtype=torch.float64)
    naive = NaiveLaggedCascade(copy.deepcopy(model), (6, 7, 6), CLASSES, staleness)
    staged = together(
        model,
        partial(CriticCascade, num_classes=CLASSES),
        data,
        staleness,
        estimator_optimizer=partial(torch.optim.SGD, lr=0.05),
    )
    user = OPTIMIZERS["sgd"](naive.stages.parameters())
    for batch in data:
        loss = staged.step([batch])
        user.zero_grad()
        expected = naive.gradients(*batch)
        user.step()
        naive.update()
        torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    for name, value in staged.state_dict().items():
        torch.testing.assert_close(value, naive.stages.state_dict()[name], atol=1e-10, rtol=0)
    for k, head in enumerate(naive.heads):
        (found,) = staged.engines[k].estimators[str(k)].head.stack.layers
        assert found.weight.any()
        torch.testing.assert_close(found.weight, head.weight, atol=1e-10, rtol=0)


def test_the_lag_changes_what_is_learnt():
    data = batches()
    torch.manual_seed(0)
    model = mlp(WIDTHS[3], dtype=torch.float32)
    ends = []
    for staleness in (0, 1, 2):
        staged = together(model, VECTOR_ESTIMATORS["linear"], data, staleness)
        for batch in data:
            staged.step([batch])
        ends.append(staged.state_dict()["0.0.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_outputs_come_down_one_stage_per_lag():
    """A critic two stages below the loss learns from outputs of 2 D updates ago, one stage below D."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(10)
    staged = together(model, VECTOR_ESTIMATORS["critic"], data, staleness=2)
    learnt = {name: [] for name in ("0", "1")}
    for batch in data:
        before = [copy.deepcopy(e.estimators) for e in staged.engines]
        staged.step([batch])
        for name in learnt:
            old, now = before[int(name)].get(name), staged.engines[int(name)].estimators[name]
            same = old is not None and all(
                torch.equal(p, q) for p, q in zip(old.parameters(), now.parameters(), strict=True)
            )
            learnt[name].append(old is not None and not same)
    assert learnt == {"0": [False] * 4 + [True] * 6, "1": [False] * 2 + [True] * 8}


def test_a_lag_and_a_stage_that_waits_exclude_each_other():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(2)
    staged = together(model, VECTOR_ESTIMATORS["linear"], data, staleness=1, bp_lambda=0.5)
    with pytest.raises(EstimatorError, match=r"staleness=1, but got bp_lambda=0.5 .* Pass staleness=0"):
        staged.step([data[0]])


WAITING = {
    "backprop": BackpropEstimator,
    "linear": partial(LinearEstimator, num_classes=CLASSES, prop_alpha=0.3),
    "mlp": partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES, prop_alpha=0.3),
    "direct feedback alignment": DirectFeedbackAlignmentEstimator,
    "kickback": partial(KickbackEstimator, num_classes=CLASSES),
    "feedback alignment": FeedbackAlignmentEstimator,
    "feedback alignment at the bottom": {"0": FeedbackAlignmentEstimator, "*": TOLD["cascade"]},
    "feedback alignment at the top": {"0": BackpropEstimator, "*": FeedbackAlignmentEstimator},
    "kickback, made by a function": lambda spec: KickbackEstimator(spec, num_classes=CLASSES),
}


@pytest.mark.parametrize("name", WAITING)
def test_estimators_that_are_told_first_are_those_of_one_process(name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dropout=0.2, dtype=torch.float32), batches(20)
    staged = together(model, WAITING[name], data)
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, WAITING[name], data)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)


@pytest.mark.parametrize("name", WAITING)
def test_a_lag_and_an_estimator_that_is_told_first_exclude_each_other(name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(2)
    staged = together(model, WAITING[name], data, staleness=1)
    with pytest.raises(EstimatorError, match=r"Estimator at boundary '0', which is told first, .*ness=0"):
        staged.step([data[0]])


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


@pytest.mark.parametrize("staleness", [-1, True])
def test_a_lag_that_is_no_number_of_updates_is_refused(staleness):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(1)
    with pytest.raises(EstimatorError, match=r"Expected `staleness` to be an integer of at least 0"):
        together(model, VECTOR_ESTIMATORS["linear"], data, staleness)


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


class Short(Told):
    """Counts on the graph of what it has said, which there is only where nothing lags."""

    needs = frozenset({Signal.TARGET})

    def __init__(self, spec):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.zeros(()))

    def synthesize(self, h, context, state):
        return (self.weight * h[0],), None

    def loss(self, record, feedback):
        return sg_loss(record.gradient, feedback.target)


def test_a_loss_without_a_graph_is_refused_by_name():
    data = batches(4)
    float32 = partial(mlp, WIDTHS[2], dtype=torch.float32)
    for batch in data:
        together(float32(), Short, data).step([batch])
    lagged = together(float32(), Short, data, staleness=1)
    lagged.step([data[0]])
    with pytest.raises(EstimatorError, match=r"the loss of Short at boundary '0' .* without a graph"):
        lagged.step([data[1]])


class Blind(nn.Module):
    """Once it is told to, passes on something that depends on nothing that takes a gradient."""

    def __init__(self):
        super().__init__()
        self.map, self.blind = nn.Linear(6, 7), False

    def forward(self, x):
        return self.map(x).detach() if self.blind else self.map(x)


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
