"""What a monitor logs in two processes is what one would log on the joint batch."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from ddp_fits import ddp, fit_on_rank, trainers
from fits import CLASSES, LINEAR, AtBatchEnd, AtBatchStart, dni, net

from lightning_dni import GradientMonitor
from lightning_dni.callbacks.replicas import Replicas
from lightning_dni.callbacks.window import BoundaryWindow
from lightning_dni.core import BoundaryReport
from lightning_dni.estimators import LocalLossEstimator

OWN = {"dni_step_time", "dni_samples_per_second", "dni_peak_memory"}
ESTIMATORS = {"linear": LINEAR, "local": partial(LocalLossEstimator, num_classes=CLASSES)}


def monitored(rank, strategy, callbacks=(), **options):
    """Every measured row, without what is each process's own."""
    rows = {}

    def read(trainer, module, batch_idx):
        if (batch_idx + 1) % (2 * trainer.accumulate_grad_batches) == 0:
            found = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("dni_")}
            rows[batch_idx] = {k: v for k, v in found.items() if k not in OWN}

    callbacks = [*callbacks, GradientMonitor(every_n_train_steps=2), AtBatchEnd(read)]
    devices = 1 if rank is None else 2
    module = net().double()
    fit_on_rank(
        rank, strategy, devices=devices, precision="64-true", module=module, callbacks=callbacks, **options
    )
    return rows


def with_estimator(rank, name, **options):
    kind = dni if rank is None else ddp
    return monitored(rank, kind(estimator=ESTIMATORS[name]), **options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_number_is_that_of_the_joint_batch(name, accumulate):
    run = partial(with_estimator, accumulate_grad_batches=accumulate)
    first, second = trainers(run, name)
    joint = run(None, name)
    assert first == second
    assert len(first) == len(joint) == 4 // accumulate
    for step, row in joint.items():
        assert {k.partition("/")[0] for k in row} >= {"dni_sg_loss", "dni_weight_cosine", "dni_weight_error"}
        assert first[step] == pytest.approx(row, rel=1e-5, abs=1e-6), step


def diverging(rank):
    def spoil(trainer, module, batch_idx):
        if rank == 1 and batch_idx == 4:
            torch.nn.init.constant_(trainer.strategy.engine.estimators["net.1"].map.bias, float("nan"))

    rows = monitored(rank, ddp(on_nonfinite="skip"), callbacks=[AtBatchStart(spoil)])
    return [(row["dni_skipped/net_0"], row["dni_skipped/net_1"]) for row in rows.values()]


def test_what_one_process_skips_is_counted_in_all():
    first, second = trainers(diverging)
    assert first == second == [(0, 0), (0, 0), (2, 2), (4, 4)]


# ---- processes that differ in what they have measured


def own_rows(rank, width):
    return torch.randn(3 + rank, width, generator=torch.Generator().manual_seed(rank)).double() + 5 * rank


class Measures(pl.Callback):
    """Sums over processes that have other numbers of rows, widths, and weights with a gradient."""

    def __init__(self, width, weight):
        self.width, self.weight, self.found = width, weight, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        target, loss = own_rows(module.global_rank, self.width), 1.0 + module.global_rank
        gradients = [{self.weight: torch.full((8,), value)} for value in (loss, 2.0)]
        report = BoundaryReport(target, target, target, torch.tensor(loss).double(), True, *gradients)
        window = BoundaryWindow()
        window.update(report)
        self.found = {k: v.item() for k, v in window.compute(Replicas(trainer.strategy, module)).items()}


def measures(rank, widths):
    measuring = Measures(widths[rank], f"net.{rank}.0.bias")
    fit_on_rank(rank, ddp(), callbacks=[measuring], max_steps=1)
    return measuring.found


@pytest.mark.parametrize("widths", [(4, 4), (4, 2)], ids=["one width", "two widths"])
def test_processes_may_differ_in_rows_widths_and_weights_that_have_a_gradient(widths):
    first, second = trainers(measures, widths)
    assert first == second
    parts = [own_rows(rank, width) for rank, width in enumerate(widths)]
    centred = [torch.cat(parts)] if widths[0] == widths[1] else parts
    squares = sum((part - part.mean(0)).square().sum() for part in centred)
    assert first["dni_sg_loss"] == pytest.approx((3 * 1.0 + 4 * 2.0) / squares.item())
    assert first["dni_weight_error"] == pytest.approx((8 / 64) ** 0.5)
    assert first["dni_weight_cosine"] == pytest.approx((8 * 2 + 8 * 4) / ((8 + 32) * 64) ** 0.5)
