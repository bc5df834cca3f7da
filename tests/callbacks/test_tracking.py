"""TrackingConditionMonitor: the figures of a twin by hand, and not a bit of the run changed."""

import copy
import warnings
from functools import partial

import pytest
import torch
from callbacks.runs import csv_rows, rows_with
from ddp_fits import ddp, fit_on_rank, rows_of, trainers
from fits import BOUNDARIES, LINEAR, AtBatchEnd, AtBatchStart, dni, fit, loader, net, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from processes import on_ranks
from torch.nn import functional as F

from lightning_dni import DNIPipelineStrategy
from lightning_dni.analysis import InjectedErrorEstimator, TrackingInstrument
from lightning_dni.callbacks import GradientMonitor, TrackingConditionMonitor
from lightning_dni.errors import StageError
from lightning_dni.pipeline.engine import StageEngine

METRICS = ["epsilon", "norm", "fraction", "delta", "held"]
KEYS = [f"dni_tracking_{metric}/net_{k}" for metric in METRICS for k in (0, 1)]


def watched(monitors, module=None, strategy=None, **options):
    logger = CSVLogger(".")
    module = net() if module is None else module
    strategy = dni() if strategy is None else strategy
    trainer = fit(module, strategy, callbacks=monitors, logger=logger, log_every_n_steps=2, **options)
    return csv_rows(logger), module, trainer


def jacobian_norm(h, parameters):
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, parameters, retain_graph=True)])
        for entry in h.flatten()
    ]
    return float(torch.linalg.matrix_norm(torch.stack(rows).double(), 2))


def test_rows_hold_the_condition_of_a_twin_by_hand():
    """With an error against the gradient its size is known: epsilon is 0.3 of the true norm."""
    seen = {}

    def before(trainer, module, index):
        if index == 1:
            seen["twin"] = copy.deepcopy(module.net)

    noisy = partial(InjectedErrorEstimator, relative_size=0.3, direction="opposed")
    monitor = TrackingConditionMonitor(2, iterations=500, tolerance=1e-9)
    rows, _, _ = watched(
        [AtBatchStart(before), monitor],
        strategy=dni(boundaries=["net.1"], estimator=noisy),
        limit_train_batches=2,
    )
    x, y = list(loader())[1]
    twin = seen["twin"]
    h = twin[1](twin[0](x))
    h.retain_grad()
    F.cross_entropy(twin[2](h), y).backward(retain_graph=True)
    parameters = [*twin[0].parameters(), *twin[1].parameters()]
    gradient = torch.cat([p.grad.flatten() for p in parameters]).norm()
    epsilon, k = 0.3 * float(h.grad.norm()), jacobian_norm(h, parameters)
    fraction = epsilon * k / float(gradient)
    found = rows[1]
    assert found["dni_tracking_epsilon/net_1"] == pytest.approx(epsilon, rel=1e-4)
    assert found["dni_tracking_norm/net_1"] == pytest.approx(k, rel=1e-4)
    assert found["dni_tracking_fraction/net_1"] == pytest.approx(fraction, rel=1e-4)
    assert found["dni_tracking_delta/net_1"] == pytest.approx((1 - fraction) / (1 + fraction), rel=1e-3)
    assert found["dni_tracking_held/net_1"] == float(fraction < 1)
    assert monitor.counts == {"net.1": (int(fraction < 1), 1)}


def test_the_run_is_the_same_to_the_bit_and_the_rows_beside_those_of_the_gradient_monitor():
    plain = net(dropout=0.2, batch_norm=True)
    fit(plain, dni())
    alone = [TrackingConditionMonitor(2, iterations=5)]
    for monitors in (alone, [GradientMonitor(2), TrackingConditionMonitor(2)]):
        rows, module, _ = watched(monitors, net(dropout=0.2, batch_norm=True))
        for key in KEYS:
            assert rows_with(rows, key) == list(range(1, 10, 2)), key
        assert all(torch.equal(t, weights(plain)[n]) for n, t in weights(module).items())
    for row in (rows[s] for s in range(1, 10, 2)):
        for k in (0, 1):  # Proposition 2's condition bounds the error of the weights
            assert row[f"dni_weight_error/net_{k}"] <= row[f"dni_tracking_fraction/net_{k}"] * 1.01


def test_an_accumulated_batch_has_an_upper_bound_of_the_joint_ones_fraction():
    joint, _, _ = watched([TrackingConditionMonitor(2)], train=loader(32, batch_size=16))
    parts, _, _ = watched(
        [TrackingConditionMonitor(2)], train=loader(32, batch_size=8), accumulate_grad_batches=2
    )
    for k in (0, 1):
        for metric in ("epsilon", "fraction", "norm"):
            key = f"dni_tracking_{metric}/net_{k}"
            if metric == "epsilon":
                assert parts[1][key] == pytest.approx(joint[1][key], rel=1e-4)
            else:
                assert joint[1][key] * 0.999 <= parts[1][key] <= joint[1][key] * 1.5


def tracked(rank):
    """Rows of a fit, in one of two processes or alone on the joint batches."""
    rows = {}

    def read(trainer, module, batch_idx):
        if batch_idx % 2:
            found = trainer.callback_metrics.items()
            rows[batch_idx] = {k: v.item() for k, v in found if k.startswith("dni_tracking")}

    monitor = TrackingConditionMonitor(2, iterations=300, tolerance=1e-7)
    strategy, devices = (dni(), 1) if rank is None else (ddp(), 2)
    options = {"callbacks": [monitor, AtBatchEnd(read)], "devices": devices, "precision": "64-true"}
    options["train"] = rows_of(rank, rows=32)
    fit_on_rank(rank, strategy, module=net().double(), **options)
    return rows


def test_two_processes_have_the_same_rows_and_bound_those_of_the_joint_batch():
    first, second = trainers(tracked)
    joint = tracked(None)
    assert first == second
    assert len(joint) == len(first) == 2
    for step, row in joint.items():
        for name in ("net_0", "net_1"):
            found = {
                m: (first[step][f"dni_tracking_{m}/{name}"], row[f"dni_tracking_{m}/{name}"]) for m in METRICS
            }
            assert found["epsilon"][0] == pytest.approx(found["epsilon"][1], rel=1e-5)
            for metric in ("norm", "fraction"):
                bound, exact = found[metric]
                assert exact * (1 - 1e-5) <= bound <= 2 * exact


def test_exact_gradients_hold_always_and_the_text_says_what_failing_means(capsys, caplog):
    caplog.set_level("INFO")
    exact = TrackingConditionMonitor(2)
    rows, _, _ = watched([exact], strategy=dni(bp_lambda=1.0), limit_train_batches=4)
    assert exact.counts == dict.fromkeys(BOUNDARIES, (2, 2))
    assert rows[1]["dni_tracking_fraction/net_1"] < 1e-5
    said = caplog.text + capsys.readouterr().err
    assert "2 of 2 measured steps at 'net.0', 2 of 2 measured steps at 'net.1'" in said
    assert "where it fails no guarantee holds, which does not say that training fails" in said


def test_counts_survive_a_checkpoint():
    monitor = TrackingConditionMonitor(2)
    monitor.counts = {"net.0": (1, 3)}
    other = TrackingConditionMonitor(2)
    other.load_state_dict(monitor.state_dict())
    assert other.counts == {"net.0": (1, 3)}


def refused_on(rank):
    """What a stage of a pipeline says to the monitor."""
    warnings.simplefilter("ignore")
    strategy = DNIPipelineStrategy(boundaries=["net.0"], estimator=LINEAR, staleness=0)
    with pytest.raises(MisconfigurationException) as caught:
        fit(
            net(), strategy, devices=2, use_distributed_sampler=False, callbacks=[TrackingConditionMonitor(2)]
        )
    return str(caught.value)


def test_pipelines_refuse_it_on_every_rank():
    for said in on_ranks(refused_on, world_size=2, grouped=False, seconds=90):
        assert "model in one process for TrackingConditionMonitor, but got DNIPipelineStrategy" in said


def test_an_engine_of_a_stage_refuses_an_instrument():
    engine = StageEngine(net(), ["net.0"], LINEAR)
    with pytest.raises(
        StageError, match=r"probe of the gradients alone in a pipeline, but got an instrument"
    ):
        engine.request_probe(TrackingInstrument())


def test_plain_strategies_and_strange_intervals_are_refused():
    with pytest.raises(MisconfigurationException, match=r"synthetic gradients for TrackingConditionMonitor"):
        fit(net(), "auto", callbacks=[TrackingConditionMonitor(2)])
    with pytest.raises(ValueError, match=r"`every_n_train_steps` to be an integer of at least 1, but got 0"):
        TrackingConditionMonitor(0)


def test_rows_that_no_logger_writes_are_warned_of():
    with pytest.warns(UserWarning, match=r"TrackingConditionMonitor\(every_n_train_steps=3\) measures steps"):
        watched([TrackingConditionMonitor(3)])
