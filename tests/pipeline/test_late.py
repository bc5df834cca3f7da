"""Delayed gradients in a pipeline: each stage keeps its graphs and weights, and is one process to the bit."""

import copy
import warnings
from functools import partial

import pytest
import torch
from core.nets import CLASSES, mlp
from pipeline.staged import WIDTHS, assert_same_bits, batches, one_process, together
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators import BackpropEstimator, DelayedGradientEstimator, LinearEstimator
from lightning_dni.pipeline.restoring import left_out


class Checkpointed(nn.Module):
    """Runs its layers once more on the way back."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


def delayed(delay):
    return partial(DelayedGradientEstimator, delay=delay)


def net(stages, batch_norm=True, dtype=torch.float32):
    torch.manual_seed(0)
    return mlp(WIDTHS[stages], dropout=0.2, batch_norm=batch_norm, dtype=dtype)


@pytest.mark.parametrize(
    ("stages", "delay", "optimizer"),
    [(2, 1, "adam"), (3, 2, "sgd"), (4, 1, "adam"), (3, 4, "adam"), (3, 0, "sgd")],
    ids=str,
)
def test_a_lag_that_is_the_delay_is_one_process_bit_for_bit(stages, delay, optimizer):
    model, data = net(stages), batches(20)
    before = copy.deepcopy(model.state_dict())
    staged = together(model, delayed(delay), data, staleness=delay, optimizer=optimizer)
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, delayed(delay), data, optimizer)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)
    moved = [n for n, value in before.items() if not torch.equal(value, model.state_dict()[n])]
    assert {n.partition(".")[0] for n in moved} == {str(k) for k in range(stages)}


def test_what_an_activation_checkpoint_runs_again_runs_on_the_weights_of_then():
    model, data = net(3, batch_norm=False), batches(12)
    for k in (0, 1):
        model[k] = Checkpointed(model[k])
    staged = together(model, delayed(2), data, staleness=2)
    losses = [staged.step([batch]) for batch in data]
    engine, expected = one_process(model, delayed(2), data)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)


def test_the_weights_stay_the_same_objects_and_no_more_batches_wait_than_the_lag():
    model, data = net(4), batches(20)
    staged = together(model, delayed(2), data, staleness=2)
    held = [list(m.parameters()) for m in staged.models]
    where = [[p.data_ptr() for p in m] for m in held]
    waiting = []
    for batch in data:
        staged.step([batch])
        waiting.append([n for e in staged.engines for n in e.state_dict()["pipeline"]["late"].values()])
    assert waiting[2:4] == [[3, 3, 2], [4, 4, 2]]
    assert waiting[-1] == [6, 4, 2]
    assert [[p.data_ptr() for p in m.parameters()] for m in staged.models] == where


def test_reports_tell_of_the_batch_that_was_differentiated_and_how_old_it_was():
    model, data = net(3), batches(12)
    staged = together(model, delayed(2), data, staleness=2)
    for batch in data:
        for engine in staged.engines:
            engine.request_report()
        staged.step([batch])
    figures = staged.engines[-1].last_report.figures
    assert {name: figures[name].staleness for name in ("0", "1")} == {"0": 4, "1": 2}
    assert all(not each._open or min(each._open) > 6 for each in (e._reporting for e in staged.engines[:2]))


class Counting(nn.Module):
    """Changes a tensor in place in every forward pass, and scales by it."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 6), torch.ones(6)
        if kind == "buffer":
            scale = self.__dict__.pop("scale")
            self.register_buffer("scale", scale)

    def forward(self, x):
        self.scale += 1.0
        return self.linear(x) * self.scale


def test_buffers_are_those_of_then():
    torch.manual_seed(0)
    model, data = nn.Sequential(Counting("buffer"), nn.Tanh(), nn.Linear(6, CLASSES)), batches(8)
    staged = together(model, delayed(1), data, staleness=1)
    for batch in data:
        staged.step([batch])
    engine, _ = one_process(model, delayed(1), data)
    assert_same_bits(staged, engine, model)


def test_what_else_is_changed_in_place_meanwhile_is_noticed():
    torch.manual_seed(0)
    model, data = nn.Sequential(Counting("attribute"), nn.Linear(6, CLASSES)), batches(4)
    staged = together(model, delayed(1), data, staleness=1)
    staged.step(data[:1])
    with pytest.raises(StageError, match=r"Expected what a stage's backward pass needs .* shape \(6,\)"):
        staged.step(data[1:2])


# ---- state


def test_what_waits_is_not_saved_and_that_is_said():
    model, data = net(3), batches(8)
    staged = together(model, delayed(2), data, staleness=2)
    for batch in data:
        staged.step([batch])
    for engine in reversed(staged.engines):
        engine.drain()  # takes what was sent, and waits for nothing that was not
    state = staged.engines[0].state_dict()
    assert (state["pipeline"]["late"], state["pipeline"]["pending"]) == ({"0": 4}, {"0": []})
    clause = r"delayed gradients under way (4 at '0') are dropped: they need graphs, which nobody saves"
    assert left_out(state, ["0", "1"], 2) == [clause]
    assert left_out(state, ["0", "1"], None) == [clause]
    again = together(model, delayed(2), data, staleness=2)
    for old, new in zip(staged.engines, again.engines, strict=True):
        new.load_state_dict(old.state_dict())
    before = copy.deepcopy(again.models[0].state_dict())
    for batch in data[:4]:
        again.step([batch])
        assert all(p.grad is None for p in again.models[0][0].parameters())
    assert all(torch.equal(p, before[n]) for n, p in again.models[0].named_parameters())
    again.step([data[4]])
    assert again.models[0][0][0].weight.grad is not None


def test_another_fit_says_which_gradients_it_drops():
    """Those of batches that waited; where none does, nothing is said."""
    data = batches(8)
    staged = together(net(3), delayed(2), data, staleness=2)
    for batch in data:
        staged.step([batch])
    lower, upper, _ = staged.engines
    for engine, said in ((lower, "4 under way at '0'"), (upper, "2 under way at '1'")):
        with pytest.warns(UserWarning, match=rf"{said} when the last fit ended are dropped"):
            engine.place(engine.plan)
        assert engine.state_dict()["pipeline"]["late"] == {engine.boundaries[engine.stage]: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in staged.engines:
            engine.place(engine.plan)


def test_saving_in_between_changes_nothing():
    data, ends = batches(12), []
    for saves in (False, True):
        staged = together(net(4), delayed(2), data, staleness=2)
        for batch in data:
            staged.step([batch])
            for engine in reversed(staged.engines) if saves else ():
                engine.drain()
                engine.state_dict()
        ends.append(staged.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_one_process_says_what_a_pipeline_drops():
    _, data = net(3), batches(4)
    engine, _ = one_process(net(3), delayed(1), data)
    (clause,) = left_out(engine.state_dict(), ["0", "1"], 1)
    assert clause == "delayed gradients under way at ['0', '1'] are dropped: they are of one process"
    assert left_out(engine.state_dict(), ["0", "1"], None) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("estimator", "staleness", "delays"),
    [
        (delayed(1), 2, "{'0': 1, '1': 1}"),
        (delayed(2), 0, "{'0': 2, '1': 2}"),
        ({"0": DelayedGradientEstimator, "1": LinearEstimator}, 1, "{'0': 1, '1': None}"),
        ({"0": BackpropEstimator, "1": DelayedGradientEstimator}, 1, "{'0': None, '1': 1}"),
        ({"0": delayed(1), "1": delayed(2)}, 1, "{'0': 1, '1': 2}"),
        ({"0": delayed(0), "1": delayed(1)}, 1, "{'0': 0, '1': 1}"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_delays_that_are_not_the_lag_everywhere_are_refused(estimator, staleness, delays):
    with pytest.raises(EstimatorError, match=rf"staleness={staleness}, but got delays {delays}. Pass the"):
        together(net(3), estimator, batches(1), staleness)


def test_a_delay_that_nobody_could_know_of_is_refused():
    data = batches(1)
    staged = together(net(3), lambda spec: DelayedGradientEstimator(spec), data, staleness=1)
    with pytest.raises(
        EstimatorError, match=r"know beforehand .* got DelayedGradientEstimator at boundary '0' f"
    ):
        staged.step(data)


@pytest.mark.parametrize("what", ["accumulated batches", "a probe"])
def test_what_a_late_stage_cannot_do_is_refused(what):
    data = batches(2)
    staged = together(net(3), delayed(1), data, staleness=1)
    if what == "a probe":
        staged.engines[0].request_probe()
    with pytest.raises(
        EstimatorError, match=f"DelayedGradientEstimator at boundary '0' and {what}. Leave that"
    ):
        staged.step(data if what == "accumulated batches" else data[:1])
