"""Proposition 2's surrogate: K is what a dense decomposition finds, and epsilon K bounds what it must."""

import copy

import numpy as np
import pytest
import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS, attached, blobs, mlp, run_step
from oracles import plain_gradients
from torch import nn
from torch.nn import functional as F

from lightning_dni.analysis import (
    TrackingCondition,
    TrackingInstrument,
    largest_singular_value,
    tracking_condition,
)
from lightning_dni.errors import StageError

NAMES = ["0", "1"]
SHARP = TrackingInstrument(iterations=500, tolerance=1e-10)


def dense(outputs, inputs):
    """The derivative of every output in every input, row by row."""
    rows = []
    for h in outputs:
        for entry in h.flatten():
            found = torch.autograd.grad(
                entry, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).detach()


def stage(kind):
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(4, 3),
        "deep": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.ReLU()),
        "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()),
        "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)),
        "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.ReLU()),
        "unused": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
    }[kind]().double()


@pytest.mark.parametrize("kind", ["linear", "deep", "batch norm", "dropout", "convolution", "unused"])
def test_k_is_the_largest_singular_value_of_the_stacked_jacobian(kind):
    module = stage(kind)
    h = module(torch.randn(6, 4, dtype=torch.float64))
    spare = nn.Parameter(torch.randn(2, dtype=torch.float64)) if kind == "unused" else None
    weights = [*module.parameters(), *([] if spare is None else [spare])]
    found = largest_singular_value([h], weights, iterations=5000, tolerance=1e-14)
    expected = np.linalg.svd(dense([h], weights).numpy(), compute_uv=False)[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)
    rough = largest_singular_value([h], weights)
    assert 0.98 * expected < float(rough) <= expected * (1 + 1e-12)  # from below


def test_k_of_several_tensors_is_of_all_of_them_stacked():
    first, second = stage("linear"), stage("deep")
    x = torch.randn(5, 4, dtype=torch.float64)
    outputs = [first(x), second(x) * 3]
    weights = [*first.parameters(), *second.parameters()]
    found = largest_singular_value(outputs, weights, iterations=2000, tolerance=1e-14)
    expected = np.linalg.svd(dense(outputs, weights).numpy(), compute_uv=False)[0]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_differentiate_in_has_no_norm():
    h = stage("linear")(torch.randn(2, 4, dtype=torch.float64))
    assert float(largest_singular_value([h], [])) == 0
    assert float(largest_singular_value([h], [nn.Parameter(torch.ones(2))])) == 0
    assert float(largest_singular_value([h * 0], list(stage("linear").parameters()))) == 0


def test_k_draws_nothing_from_the_global_generator_and_leaves_grad_alone():
    module = stage("deep")
    h = module(torch.randn(3, 4, dtype=torch.float64))
    before = torch.get_rng_state()
    largest_singular_value([h], list(module.parameters()))
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in module.parameters())
    h.sum().backward()  # the graph is still there


# ---- in a training step


def probed(bp_lambda=0.0, scale=None, instrument=SHARP):
    torch.manual_seed(0)
    model, batch = mlp((5, 6, 7, CLASSES)), blobs()
    engine = attached(model, NAMES, VECTOR_ESTIMATORS["linear"], bp_lambda=bp_lambda)
    for _ in range(5):
        run_step(engine, model, batch)
        engine.update_estimators()
    model.zero_grad()
    twin = copy.deepcopy(model)
    engine.request_probe(instrument)
    factor = 1.0 if scale is None else scale
    run_step(
        engine,
        model,
        batch,
        lambda out, y: factor * F.cross_entropy(out, y),
        scale=None if scale is None else torch.tensor(scale),
    )
    return engine, model, twin, batch


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_condition_is_of_the_norms_that_plain_backprop_and_a_dense_svd_give(bp_lambda, scale):
    engine, model, twin, (x, y) = probed(bp_lambda, scale)
    _, true = plain_gradients(twin, x, lambda out: F.cross_entropy(out, y), NAMES)
    factor = 1.0 if scale is None else scale
    below = x
    for name, report in engine.last_report.boundaries.items():
        found = tracking_condition(report.measured[SHARP], report.true_weights)
        weights = list(twin[int(name)].parameters())
        gradient = torch.cat([p.grad.flatten() for p in weights])
        assert float(found.gradient_norm) == pytest.approx(float(gradient.norm()), rel=1e-9)
        h = twin[int(name)](below)
        jacobian = dense([h], weights)
        assert float(found.jacobian_norm) == pytest.approx(
            float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-5
        )
        arrived = report.target if bp_lambda else report.synthetic
        applied = ((1 - bp_lambda) * report.synthetic + bp_lambda * arrived) / len(x)
        epsilon = float((applied - true[name]).norm())
        assert float(found.epsilon) == pytest.approx(epsilon, rel=1e-9)
        # the back-propagated error is what the condition bounds
        given = torch.cat([p.grad.flatten() for p in model[int(name)].parameters()]) / factor
        assert float((given - gradient).norm()) <= epsilon * float(found.jacobian_norm) * (1 + 1e-4)
        below = h.detach()


def condition(epsilon, k, norm):
    return TrackingCondition(*(torch.tensor(v, dtype=torch.float64) for v in (epsilon, k, norm)))


@pytest.mark.parametrize(
    ("epsilon", "k", "norm", "fraction", "delta", "held"),
    [
        (0.1, 2.0, 1.0, 0.2, 0.8 / 1.2, True),
        (1.0, 2.0, 1.0, 2.0, -1 / 3, False),
        (0.0, 2.0, 0.0, 0.0, 1.0, True),
        (0.1, 2.0, 0.0, float("inf"), -1.0, False),
    ],
)
def test_fraction_and_delta_are_those_of_the_inequality(epsilon, k, norm, fraction, delta, held):
    found = condition(epsilon, k, norm)
    assert float(found.fraction) == pytest.approx(fraction)
    assert float(found.delta) == pytest.approx(delta)
    assert bool(found.held) is held
    if held and norm:
        assert epsilon * k == pytest.approx(norm * (1 - delta) / (1 + delta))


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


class Fused(nn.Module):
    def forward(self, x):
        return OnceDifferentiable.apply(x)


def test_a_stage_without_second_derivatives_is_refused_by_name():
    model, batch = nn.Sequential(nn.Linear(5, 6).double(), Fused(), nn.Linear(6, CLASSES).double()), blobs()
    engine = attached(model, ["1"])
    engine.request_probe(TrackingInstrument())
    with pytest.raises(
        StageError, match=r"below boundary '1' to have second derivatives.*TrackingConditionMonitor"
    ):
        run_step(engine, model, batch)
