"""What stages measure is what one process measures, and measuring it changes nothing."""

import copy
from functools import partial

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS, mlp
from pipeline.staged import TOLD, WIDTHS, batches, loss_of, together
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import DNIEngine
from lightning_dni.core.report import Utilization
from lightning_dni.core.sums import BoundarySums
from lightning_dni.pipeline.local import LocalChannel
from lightning_dni.pipeline.mail import ROOM, Letter, Mail, Topic, open_bag
from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.together import StagesTogether


def ask(engine, how):
    if how is not None:
        getattr(engine, how)()


def step_together(staged, data, how):
    """Train, asking in every step; what the last stage knows after each."""
    reports = []
    for batch in data:
        for engine in staged.engines:
            ask(engine, how)
        staged.step([batch])
        reports.append(staged.engines[-1].last_report)
    return reports


def measured_in_one_process(model, estimator, data, how, **options):
    """Figures of every step of DNIEngine, by boundary."""
    boundaries = [str(k) for k in range(len(model) - 1)]
    engine = DNIEngine(model, boundaries, estimator, rng="stage", seed=3, **options)
    user, found = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    with engine:
        for batch in data:
            user.zero_grad()
            getattr(engine, how)()
            with engine.training_step(batch):
                loss = loss_of(model, batch)
            engine.backward(loss)
            figures = {}
            for name, report in engine.last_report.boundaries.items():
                sums = BoundarySums()
                sums.update(report)
                figures[name] = sums.figures().sums
            found.append(figures)
            user.step()
            engine.update_estimators()
    return found


@pytest.mark.parametrize("how", ["request_report", "request_probe"])
@pytest.mark.parametrize(
    ("stages", "bp_lambda", "name"),
    [
        (3, 0.0, "linear"),
        (4, 0.0, "critic"),
        (3, 0.5, "mlp"),
        (3, 1.0, "zero"),
        (2, 0.0, "local_loss"),
        (4, 0.0, "cascade"),
    ],
)
def test_without_lag_the_figures_are_those_of_one_process(how, stages, bp_lambda, name):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[stages], dropout=0.2, batch_norm=True, dtype=torch.float32), batches(10)
    twin, estimator = copy.deepcopy(model), (VECTOR_ESTIMATORS | TOLD)[name]
    staged = together(model, estimator, data, bp_lambda=bp_lambda)
    reports = step_together(staged, data, how)
    expected = measured_in_one_process(twin, estimator, data, how, bp_lambda=bp_lambda)
    for step in range(1, 10):
        figures = reports[step].figures
        assert list(figures) == [str(k) for k in range(stages - 1)]
        assert reports[step].probed == (how == "request_probe")
        for boundary, found in figures.items():
            assert found.staleness == 0
            assert found.sums.keys() == expected[step - 1][boundary].keys()
            for family, sums in found.sums.items():
                assert_close(sums, expected[step - 1][boundary][family], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("how", ["request_report", "request_probe"])
def test_measuring_changes_no_bit(staleness, how):
    finals = []
    for asked in (None, how):
        torch.manual_seed(0)
        model, data = mlp(WIDTHS[4], dropout=0.2, batch_norm=True, dtype=torch.float32), batches(20)
        staged = together(model, VECTOR_ESTIMATORS["critic"], data, staleness)
        for i, batch in enumerate(data):
            for engine in staged.engines:
                ask(engine, asked if i % 3 == 1 else None)
            staged.step([batch])
        estimators = {
            f"{n}.{k}": v
            for e in staged.engines
            for n, m in e.estimators.items()
            for k, v in m.state_dict().items()
        }
        finals.append(staged.state_dict() | estimators)
    assert finals[0].keys() == finals[1].keys()
    assert [n for n, v in finals[0].items() if not torch.equal(v, finals[1][n])] == []


def true_squares(model, batch):
    """Squared norms of dL/dh per row at every boundary, and of the gradients of the stages' weights."""
    h, activations = batch[0], []
    for stage in model:
        h = stage(h)
        activations.append(h)
    loss = nn.functional.cross_entropy(h, batch[1], reduction="sum")
    parts = [list(stage.parameters()) for stage in model[:-1]]
    at = torch.autograd.grad(loss, activations[:-1], retain_graph=True)
    weights = [torch.autograd.grad(loss / len(h), part, retain_graph=True) for part in parts]
    return [g.square().sum() for g in at], [sum(g.square().sum() for g in found) for found in weights]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_true_gradients_are_those_of_the_whole_model_at_that_step(staleness):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4]), batches(12, dtype=torch.float64)
    staged, expected = together(model, VECTOR_ESTIMATORS["linear"], data, staleness), []
    for i, batch in enumerate(data):
        whole = copy.deepcopy(model)
        whole.load_state_dict(staged.state_dict())
        expected.append(true_squares(whole, batch))
        for engine in staged.engines:
            engine.request_probe()
        staged.step([batch])
        report = staged.engines[-1].last_report
        if i > staleness:
            squares, weights = expected[i - 1 - staleness]
            for k, (name, found) in enumerate(report.figures.items()):
                assert name == str(k)
                assert found.staleness == staleness
                assert_close(found.sums["true"][2], squares[k], rtol=1e-9, atol=0)
                assert_close(found.sums["weights"][2], weights[k], rtol=1e-9, atol=0)
        else:
            assert not report.figures


def test_accumulated_batches_are_one_report():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), [batch for batch in batches(4) if len(batch[0]) == 8]
    joint, second = (tuple(torch.cat(part) for part in zip(*data[k : k + 2], strict=True)) for k in (0, 1))
    twin = copy.deepcopy(model)
    staged, take = together(model, VECTOR_ESTIMATORS["local_loss"], data), StagesTogether._pass

    def asking(self, *args, **kwargs):
        for engine in self.engines:
            engine.request_probe()
        return take(self, *args, **kwargs)

    staged._pass = partial(asking, staged)
    for k in (0, 1):
        staged.step(data[k : k + 2])
    measured = measured_in_one_process(
        twin, VECTOR_ESTIMATORS["local_loss"], [joint, second], "request_probe"
    )
    figures = staged.engines[-1].last_report.figures
    assert list(figures) == list(measured[0])
    for boundary, found in figures.items():
        for family, sums in found.sums.items():
            assert_close(sums, measured[0][boundary][family], rtol=1e-6, atol=1e-12)


def test_nothing_is_measured_without_a_request():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(4)
    staged = together(model, VECTOR_ESTIMATORS["linear"], data)
    assert step_together(staged, data, None) == [None] * 4


# ---- letters


def mailed(count, numbers, messages):
    """Letters that go up one stage."""
    arrived, way = [], LocalChannel()
    below, above = Mail(arrived.append), Mail(arrived.append)
    out = below.carry(Links(activation_out=way)).activation_out
    into = above.carry(Links(activation_in=way)).activation_in
    for k in range(count):
        below.post(Letter(Topic.FIGURES, 3, k, tuple(map(float, range(numbers)))))
    told = []
    for step, kind in enumerate(messages):
        out.send(Message(step, kind, facts=(7.0, 8.0)))
        assert into.receive() == Message(step, kind, facts=(7.0, 8.0))
        told.append(len(arrived))
    return arrived, told


def test_letters_wait_where_a_message_is_full_and_keep_their_order():
    fit = ROOM // 24
    arrived, told = mailed(2 * fit + 1, 20, [Kind.TRAIN, Kind.EVALUATE, Kind.TRAIN, Kind.TRAIN])
    assert told == [fit, fit, 2 * fit, 2 * fit + 1]
    assert [letter.step for letter in arrived] == list(range(2 * fit + 1))
    assert arrived[0] == Letter(Topic.FIGURES, 3, 0, tuple(map(float, range(20))))


def test_a_bag_is_opened_as_it_was_filled():
    letters = [Letter(Topic.UTILIZATION, 0, 5, (0.5,)), Letter(Topic.FIGURES, 2, 1, ())]
    assert open_bag(letters[0].encode() + letters[1].encode()) == letters


# ---- time


def test_time_is_counted_where_it_goes(monkeypatch):
    from lightning_dni.pipeline import clock as module
    from lightning_dni.pipeline.clock import Activity, StageClock

    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    clock = StageClock()

    def passing(seconds):
        now[0] += seconds

    passing(1)
    with clock.around()("pipeline.forward"):
        passing(2)
        with clock.doing(Activity.WAIT_IN):
            passing(4)
        passing(8)
    passing(16)
    clock.was(Activity.OPTIMIZER)
    with clock.stopped():
        passing(32)
        with clock.doing(Activity.WAIT_OUT):
            passing(64)
    with clock.doing(Activity.WAIT_OUT):
        passing(128)
    assert clock.read() == Utilization(busy=26, wait_in=4, wait_out=128, whole=159)
    clock.restart()
    assert clock.read() == Utilization(0, 0, 0, 0)
