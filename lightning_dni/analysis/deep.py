"""Deep linear networks, a linear synthetic gradient between two hidden layers (section 4, Corollary 1)."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_dni.analysis.critical import Stationarity, stationarity
from lightning_dni.analysis.linear import LinearMap
from lightning_dni.analysis.regression import LossName, Teacher, row_losses
from lightning_dni.core import DNIEngine
from lightning_dni.core.distance import difference_sums, norm_quotient
from lightning_dni.estimators import LinearEstimator


@dataclass(frozen=True)
class DeepRun:
    """A finished run.

    Attributes:
        model: The network.
        losses: Mean loss of a row at the start of every step and at the end, `[steps + 1]`.
        synthesizer: The synthetic gradient at the end; None for backprop.
        sg_error: Its distance to the true gradient in the last step, over the norm of that.
        stationarity: How far from critical the end is, for net and synthetic gradient and for backprop.
    """

    model: nn.Sequential
    losses: Float[Tensor, " points"]
    synthesizer: LinearMap | None
    sg_error: float | None
    stationarity: Stationarity


def deep_linear(
    features: int,
    outputs: int = 1,
    hidden_layers: int = 10,
    width: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear layers and nothing between them, with orthogonal weights from a generator of their own.

    Args:
        features: Number of inputs.
        outputs: Number of outputs.
        hidden_layers: Number of layers before the last.
        width: Of the hidden layers.
        seed: Of the weights.
        dtype: Precision.
    """
    sizes = [features, *[width] * hidden_layers, outputs]
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b, device="meta", dtype=dtype).to_empty(device="cpu") for a, b in pairwise(sizes)]
    for layer in layers:  # made without drawing from the global generator
        nn.init.orthogonal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def train_deep_linear(
    x: Float[Tensor, "rows features"],
    y: Float[Tensor, "rows outputs"],
    *,
    loss: LossName = "mse",
    teacher: Teacher = "synthetic",
    hidden_layers: int = 10,
    width: int = 2,
    steps: int = 4000,
    learning_rate: float = 1e-3,
    sg_learning_rate: float = 1e-2,
    sg_steps: int = 1,
    seed: int = 0,
) -> DeepRun:
    """Train a deep linear network, cut in the middle of its hidden layers, on the whole batch with Adam.

    Both learning rates fall linearly to zero.

    Args:
        x: Inputs.
        y: Targets; 0 or 1 for the log loss.
        loss: See `row_losses`.
        teacher: "true" for backprop.
        hidden_layers: Number of hidden layers.
        width: Their width.
        steps: Number of steps.
        learning_rate: The net's.
        sg_learning_rate: The synthetic gradient's.
        sg_steps: Steps of the synthetic gradient in each of the net's, at least 1.
        seed: Of the weights.
    """
    model = deep_linear(x.shape[1], y.shape[1], hidden_layers, width, seed, x.dtype)
    boundary = str(hidden_layers // 2 - 1)
    engine = DNIEngine(
        model,
        [boundary],
        partial(LinearEstimator, context_size=y.shape[1]),
        estimator_optimizer=partial(torch.optim.Adam, lr=sg_learning_rate),
        estimator_scheduler=partial(LambdaLR, lr_lambda=lambda step: max(0.0, 1 - step / steps)),
        estimator_steps=sg_steps,
        bp_lambda=0.0 if teacher == "synthetic" else 1.0,
        seed=seed,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    fade = LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    with engine:
        for step in range(steps):
            optimizer.zero_grad()
            if step == steps - 1:
                engine.request_probe()
            with engine.training_step((x, y)):
                mean = row_losses(model(x), y, loss).mean()
            engine.backward(mean)
            losses.append(mean.detach())
            optimizer.step()
            engine.update_estimators()
            fade.step()
    losses.append(row_losses(model(x).detach(), y, loss).mean())
    synthesizer = error = None
    estimator = engine.estimators[boundary] if teacher == "synthetic" else None
    if isinstance(estimator, LinearEstimator) and engine.last_report is not None:
        report = engine.last_report.boundaries[boundary]
        assert report.true is not None
        synthesizer = LinearMap.of(estimator)
        error = float(norm_quotient(*difference_sums(report.synthetic, report.true)))
    below, above = model[: hidden_layers // 2], model[hidden_layers // 2 :]
    found = stationarity(below, above, estimator, x, y, lambda p: row_losses(p, y, loss))
    return DeepRun(model, torch.stack(losses), synthesizer, error, found)
