"""A report says what happened, in the units it promises."""

import copy

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    VECTOR_ESTIMATORS,
    Told,
    assert_close,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
)
from oracles import decoupled_backward
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine, HasEngine, Observable, sg_loss

WIDTHS = (5, 6, 7, 6, CLASSES)


def reported(engine, model, batch, **options):
    engine.request_report()
    run_step(engine, model, batch, **options)
    return engine.last_report


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_synthetic_and_target_are_in_units_of_the_row(bp_lambda):
    model, (x, y) = mlp(WIDTHS), blobs()
    twin = copy.deepcopy(model)
    report = reported(attached(model, ["2", "0", "1"], bp_lambda=bp_lambda), model, (x, y))
    _, arrived = decoupled_backward(
        twin, x, lambda out: F.cross_entropy(out, y), [torch.sin] * 3, [bp_lambda] * 3
    )
    assert list(report.boundaries) == ["0", "1", "2"]
    h = x
    for k, facts in enumerate(report.boundaries.values()):
        h = twin[k](h)
        torch.testing.assert_close(facts.synthetic, h.sin(), rtol=0, atol=1e-14)
        torch.testing.assert_close(facts.target, arrived[k] * 8, rtol=0, atol=1e-14)
        assert facts.true is None
        assert facts.loss is None


def test_the_loss_is_the_estimators_own():
    kinds = {"0": VECTOR_ESTIMATORS["local_loss"], "1": VECTOR_ESTIMATORS["linear"]}
    model, batch = mlp(), blobs()
    engine = attached(model, ["0", "1"], kinds)
    report = reported(engine, model, batch, accumulate=4, scale=torch.tensor(8.0))
    linear, local = report.boundaries["1"], report.boundaries["0"]
    torch.testing.assert_close(linear.loss, sg_loss([linear.synthetic], [linear.target]))
    torch.testing.assert_close(local.loss, torch.tensor(CLASSES).double().log())
    assert linear.regresses
    assert not local.regresses


def test_a_report_is_of_one_step():
    model, batch = mlp(), blobs()
    engine = attached(model, ["0"])
    assert engine.last_report is None
    assert reported(engine, model, batch).step == 0
    run_step(engine, model, batch)
    assert engine.last_report is None
    assert reported(engine, model, batch).step == 2


def test_a_probe_is_not_taken_back_by_a_report():
    model = mlp()
    engine = attached(model, ["0"])
    engine.request_probe()
    assert reported(engine, model, blobs()).probed


def test_calls_lie_below_one_another_and_leaves_side_by_side():
    from core.test_structure import Pack, Unpack

    model, (x, y) = nn.Sequential(Pack("tuple"), Unpack("tuple")), blobs()
    engine = attached(model, ["0"])
    engine.request_report()
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model(x) + model(-x), y)
    engine.backward(loss)
    rows = [torch.cat(model[0](z), 1).sin() for z in (x, -x)]
    torch.testing.assert_close(
        engine.last_report.boundaries["0"].synthetic, torch.cat(rows), rtol=0, atol=1e-14
    )


def test_a_dropped_forward_is_not_reported():
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0"])
    engine.request_report()
    with engine.training_step((x, y)):
        model(x)
        loss = F.cross_entropy(model(x), y)
    engine.backward(loss)
    assert len(engine.last_report.boundaries["0"].synthetic) == 8


def test_callbacks_see_an_engine_through_a_protocol():
    class Strategy:
        engine = DNIEngine(mlp(), ["0"], Told)

    assert isinstance(Strategy.engine, Observable)
    assert isinstance(Strategy(), HasEngine)
    assert not isinstance(mlp(), HasEngine)


def test_weights_reported_for_a_module_that_ran_twice_are_counted_once():
    """The report summed gradients after the merge had already added one to the other in place."""
    reported = {}
    for probe in (True, False):
        torch.manual_seed(0)
        model, (x, y) = mlp(), blobs()
        engine = attached(model, ["0", "1"])
        if probe:
            engine.request_probe()
        with engine.training_step((x, y)):
            loss = F.cross_entropy(model(x) + model(x * 2), y)
        engine.backward(loss)
        if probe:
            for boundary in engine.last_report.boundaries.values():
                reported.update(boundary.applied_weights)
    assert_close(dict(reported), {n: g for n, g in grads(model).items() if n in reported})


def test_a_report_does_not_change_with_the_gradients_it_reports():
    """Clipping after backward rewrote the report, which shared memory with `.grad`."""
    model, batch = mlp(), blobs()
    engine = attached(model, ["0", "1"])
    engine.request_probe()
    run_step(engine, model, batch)
    before = {
        n: t.clone() for b in engine.last_report.boundaries.values() for n, t in b.applied_weights.items()
    }
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    after = {n: t for b in engine.last_report.boundaries.values() for n, t in b.applied_weights.items()}
    assert same_bits(before, after)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 6, batch_first=True, dtype=torch.float64)

    def forward(self, x):
        return self.rnn(x)


class FromState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, CLASSES, dtype=torch.float64)

    def forward(self, value):
        return self.layer(value[0][:, -1] + value[1][0][-1])


@pytest.mark.parametrize("request_", ["request_report", "request_probe"])
def test_leaves_of_different_row_counts_can_be_reported(request_):
    """nn.LSTM returns [batch, ...] beside [layers, batch, ...]: training ran, a monitor made it crash."""
    model = nn.Sequential(LastState(), FromState())
    engine = attached(model, ["0"])
    batch = (torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(0, CLASSES, (4,)))
    getattr(engine, request_)()
    run_step(engine, model, batch)
    assert engine.last_report.boundaries["0"].target is not None


def test_a_boundary_that_runs_at_two_sizes_can_be_reported():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Flatten(2)).double()
    engine = attached(model, ["0"])
    engine.request_probe()
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    with engine.training_step((x, None)):
        loss = model(x).square().sum() + model(x[..., ::2]).square().sum()
    engine.backward(loss)
    assert engine.last_report.boundaries["0"].true is not None
