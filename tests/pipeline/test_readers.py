"""Feedback alignment over stages: the layers above a boundary are swapped as in one process."""

import copy
import warnings
from functools import partial

import pytest
import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS, mlp
from core.test_consumer import Checkpointed, Functional, OwnWeights, Residual
from pipeline.staged import (
    OPTIMIZERS,
    WIDTHS,
    assert_same_bits,
    batches,
    loss_of,
    one_process,
    together,
    train_whole,
)
from pipeline.test_reporting import measured_in_one_process, step_together
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import BackpropEstimator, FeedbackAlignmentEstimator
from lightning_dni.pipeline.together import StagesTogether

float32 = partial(mlp, dropout=0.2, batch_norm=True, dtype=torch.float32)


def check(model, estimator, data, accumulate=1, **options):
    """The stages are one process to the bit; returns them and its engine."""
    staged = together(model, estimator, data, **options)
    for i in range(0, len(data), accumulate):
        staged.step(data[i : i + accumulate])
    engine, _ = one_process(model, estimator, data, accumulate=accumulate, **options)
    assert_same_bits(staged, engine, model)
    return staged, engine


@pytest.mark.parametrize(("stages", "accumulate"), [(2, 1), (4, 3)])
def test_the_stages_are_one_process(stages, accumulate):
    torch.manual_seed(0)
    check(float32(WIDTHS[stages]), FeedbackAlignmentEstimator, batches(48), accumulate)


def test_it_is_not_backprop():
    """Guard: the comparison above sees the matrices."""
    ends = []
    for estimator in (FeedbackAlignmentEstimator, BackpropEstimator):
        torch.manual_seed(0)
        data = batches(4)
        staged = together(float32(WIDTHS[3]), estimator, data)
        for batch in data:
            staged.step([batch])
        ends.append(staged.state_dict())
    assert not torch.equal(ends[0]["0.0.weight"], ends[1]["0.0.weight"])


def test_a_way_back_of_a_users_own_is_asked_for_where_the_layer_is():
    """It reads the layer's weights, which only the stage above trains."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4]), batches(10, dtype=torch.float64)
    twin = copy.deepcopy(model)
    staged, _ = check(model, OwnWeights, data)
    user = OPTIMIZERS["sgd"](twin.parameters())
    for batch in data:
        user.zero_grad()
        loss_of(twin, batch).backward()
        user.step()
    assert_close(staged.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)


def deep(wrapped=lambda stage: stage):
    """Two layers in each stage but the first and the last, of which the first has two as well."""
    stages = [
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)),
        nn.Sequential(nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)),
        nn.Sequential(nn.Tanh(), nn.Linear(6, 6)),
        nn.Linear(6, CLASSES),
    ]
    return nn.Sequential(*map(wrapped, stages))


def test_what_makes_it_a_hybrid_is_told_by_the_stage_that_has_it():
    torch.manual_seed(0)
    data = batches(3)
    staged = together(deep(), FeedbackAlignmentEstimator, data)
    with pytest.warns(UserWarning, match="hybrid with backprop") as caught:
        staged.step([data[0]])
    said = [str(w.message) for w in caught if "hybrid" in str(w.message)]
    assert ["['1.3']" in said[0], "['0.2']" in said[1], len(said)] == [True, True, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        staged.step([data[1]])
        engine, _ = one_process(mlp(WIDTHS[3], dtype=torch.float32), FeedbackAlignmentEstimator, data)
        proper = together(mlp(WIDTHS[3], dtype=torch.float32), FeedbackAlignmentEstimator, data)
        assert proper.engines[0].describe()["feedback_alignment"] == "known after the first step"
        proper.step([data[0]])
    last = staged.engines[-1]
    assert last.describe()["feedback_alignment"] == "proper"
    last.introduce([each.describe() for each in staged.engines])
    assert last.describe()["feedback_alignment"] == "hybrid, exact through ['0.2'] and ['1.3']"
    proper.engines[-1].introduce([each.describe() for each in proper.engines])
    assert proper.engines[-1].describe()["feedback_alignment"] == "proper"
    assert engine.describe()["feedback_alignment"] == "proper"
    assert "feedback_alignment" not in together(deep(), BackpropEstimator, data).engines[0].describe()


@pytest.mark.parametrize(
    ("middle", "match"),
    [
        (Residual, "'a way from 0 that meets no layer'"),
        (Functional, r"'a weight of shape \(6, 6\) before 1.map'"),
    ],
)
def test_what_goes_round_the_layers_is_told(middle, match):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), middle(), nn.Linear(6, CLASSES))
    with pytest.warns(UserWarning, match=rf"exactly through \[{match}\]"):
        check(model, FeedbackAlignmentEstimator, batches(3))


@pytest.mark.filterwarnings("ignore:.*hybrid with backprop")
def test_activation_checkpoints_change_nothing():
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        staged, _ = check(
            deep(partial(Checkpointed, enabled=enabled)), FeedbackAlignmentEstimator, batches(6)
        )
        ends.append(staged.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# ---- measured


FACTORIES = {
    "everywhere": FeedbackAlignmentEstimator,
    "at the top": {"2": FeedbackAlignmentEstimator, "*": VECTOR_ESTIMATORS["linear"]},
    "at the bottom": {"0": FeedbackAlignmentEstimator, "*": BackpropEstimator},
}


@pytest.mark.parametrize(
    ("how", "name"),
    [("request_report", "everywhere"), *(("request_probe", name) for name in FACTORIES)],
)
def test_the_figures_are_those_of_one_process(how, name):
    torch.manual_seed(0)
    model, data = float32(WIDTHS[4]), batches(6)
    twin = copy.deepcopy(model)
    staged = together(model, FACTORIES[name], data)
    reports = step_together(staged, data, how)
    expected = measured_in_one_process(twin, FACTORIES[name], data, how)
    for step in range(1, 6):
        for boundary, found in reports[step].figures.items():
            assert found.sums.keys() == expected[step - 1][boundary].keys()
            for family, sums in found.sums.items():
                assert_close(sums, expected[step - 1][boundary][family], rtol=1e-5, atol=1e-10)
    measured = staged.state_dict()
    alone = together(model, FACTORIES[name], data)
    for batch in data:
        alone.step([batch])
    assert all(torch.equal(value, measured[n]) for n, value in alone.state_dict().items())


# ---- kept


def test_what_one_process_has_saved_is_gone_on_with_and_the_other_way():
    """Made with another seed, so that the matrices are other ones until they are restored."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dropout=0.2, dtype=torch.float32), batches(20)
    sgd = partial(torch.optim.SGD, lr=0.1)
    boundaries, estimator = ["0", "1", "2"], FeedbackAlignmentEstimator

    def fresh(model, seed=3):
        return StagesTogether(model, boundaries, estimator, loss_of, sgd, data[0], seed=seed)

    def stages(model, data, state=None, seed=3):
        staged = fresh(model, seed)
        for engine in staged.engines if state else ():
            engine.load_state_dict(copy.deepcopy(state))
        for batch in data:
            staged.step([batch])
        return staged

    def one(model, data, state=None, seed=3):
        engine = DNIEngine(model, boundaries, estimator, rng="stage", seed=seed)
        if state:
            engine.load_state_dict(copy.deepcopy(state))
        train_whole(engine, model, sgd(model.parameters()), data)
        return engine

    whole, half = (copy.deepcopy(model) for _ in range(2))
    one(whole, data)
    state = one(half, data[:9]).state_dict()
    after = stages(half, data[9:], state, seed=7).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in whole.state_dict().items())
    other = copy.deepcopy(state)  # as of a version that drew them otherwise
    other["estimators"]["0"]["matrices._extra_state"] += 1
    ends, twin = stages(half, data[9:], other, seed=7).state_dict(), copy.deepcopy(half)
    one(twin, data[9:], other, seed=7)
    assert all(torch.equal(value, ends[name]) for name, value in twin.state_dict().items())
    assert not torch.equal(ends["0.0.weight"], after["0.0.weight"])

    staged = stages(model, data[:9])
    kept = [engine.state_dict()["estimators"] for engine in staged.engines]
    assert [list(each) for each in kept] == [["0"], ["1"], ["2"], []]
    assert {n: s for each in kept for n, s in each.items()} == state["estimators"]
    half.load_state_dict(staged.state_dict())
    one(half, data[9:], state, seed=7)
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in whole.state_dict().items())


def test_an_evaluation_between_changes_nothing_and_no_hook_is_left():
    ends = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(6)
        staged = together(model, FeedbackAlignmentEstimator, data)
        for batch in data:
            staged.step([batch])
            for engine, stage in zip(staged.engines, staged.models, strict=True) if evaluates else ():
                engine.evaluate(partial(stage, batch[0]), batch)
        for engine in staged.engines:
            engine.detach()
        hooks = [
            len(m._forward_pre_hooks) + len(m._forward_hooks) for m in staged.models for m in m.modules()
        ]
        assert not any(hooks)
        ends.append(staged.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# ---- refused


class Learned(OwnWeights):
    """Would send back through weights of its own that learn."""

    def __init__(self, spec):
        super().__init__(spec)
        self.matrix = nn.Parameter(torch.zeros(3))


class Product(nn.Module):
    def forward(self, h):
        return h[:, :CLASSES]


@pytest.mark.parametrize(
    ("estimator", "options", "match"),
    [
        (
            lambda spec: FeedbackAlignmentEstimator(spec),
            {},
            r"at boundary '0' from a function. Pass the class",
        ),
        (Learned, {}, r"nothing to be trained in Learned at boundary '0', .* got 1 param.*strategy='dni'"),
        (FeedbackAlignmentEstimator, {"bp_lambda": 0.5}, r"Expected bp_lambda=0 for .* got 0.5"),
        (FeedbackAlignmentEstimator, {"staleness": 1}, r"which is told first, .* Pass staleness=0"),
    ],
)
def test_what_would_be_something_else_is_refused(estimator, options, match):
    torch.manual_seed(0)
    data = batches(1)
    staged = together(mlp(WIDTHS[3], dtype=torch.float32), estimator, data, **options)
    with pytest.raises(EstimatorError, match=match):
        staged.step(data)


@pytest.mark.parametrize("above", [[Product()], [Product(), nn.Linear(CLASSES, CLASSES)]])
def test_an_activation_that_no_layer_reads_is_refused(above):
    torch.manual_seed(0)
    data = batches(1)
    staged = together(nn.Sequential(nn.Linear(5, 6), *above), FeedbackAlignmentEstimator, data)
    with pytest.raises(EstimatorError, match=r"read the output of boundary '0' for Feedback.*but none did"):
        staged.step(data)
