"""Small experiments of Czarnecki et al. 2017 as functions, which studies call; each returns figures.

Figures are numbers, curves (sequences of numbers) and pictures, by name, as `docs/studies.md` says.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.analysis import (
    artificial_data,
    conservation_of,
    descend,
    loss_surface,
    loss_surfaces,
    plane,
    regress,
    train_deep_linear,
)
from lightning_dni.analysis.counter_example import Module, residuals_at
from lightning_dni.analysis.data import Kind
from lightning_dni.analysis.implicit import Losses
from lightning_dni.analysis.regression import LossName
from lightning_dni.callbacks import draw_counter_example, draw_loss_surfaces
from lightning_dni.core import DNIEngine, EstimatorFactory
from lightning_dni.core.randomness import seeded
from lightning_dni.demos import DigitsDataModule, MLPClassifier
from lightning_dni.estimators import (
    BackpropEstimator,
    CriticEstimator,
    DelayedGradientEstimator,
    LinearEstimator,
)
from lightning_dni.pipeline.together import StagesTogether

Figures = Mapping[str, Any]
Cuts = Literal["one", "everywhere"]
Method = Literal["cDNI", "critic", "delayed"]


def _half_squares(output: Tensor, labels: Tensor) -> Tensor:
    return (output - F.one_hot(labels, output.shape[1])).square().sum(1) / 2


CLASS_LOSSES: Mapping[LossName, Losses] = {
    "mse": _half_squares,
    "log": partial(F.cross_entropy, reduction="none"),
}


WAYS: Mapping[Module, str] = {"constant": "constant SG", "sign": "SG c sign(f)", "none": "backprop"}


def counter_example(start: Sequence[float], module: Module, steps: int = 4000) -> Figures:
    """Descend the counter-example of supplement A.

    Args:
        start: a, b and c.
        module: What gives the gradient: "constant", "sign" or "none" for backprop.
        steps: Number of steps.

    Returns:
        The curve `loss`, where it ends (`slope`, `offset`), the picture `surface` with the ways of all
        three modules from this start, and how far from critical
        that point is, in units of the mean loss of a row (`Stationarity`): `residual_above`, `residual_below`
        and `residual_sg` of the joint system, and `residual_below_true`, which is backprop's.
    """
    a, b, c = start
    runs = {name: descend((a, b, c), name, steps) for name in WAYS}
    run = runs[module]
    slope, offset, _ = run.parameters[-1].tolist()
    found = residuals_at(run.parameters[-1], module)
    residuals = {
        "above": found.above,
        "below": found.below,
        "sg": found.estimator,
        "below_true": found.below_true,
    }
    return {
        "loss": run.losses,
        "slope": slope,
        "offset": offset,
        "surface": draw_counter_example(loss_surface(), {WAYS[name]: each for name, each in runs.items()}),
        **{f"residual_{name}": float(value) for name, value in residuals.items()},
    }


def linear_dynamics(
    kind: Kind,
    features: int,
    loss: LossName,
    rows: int = 400,
    steps: int = 6000,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Figures:
    """Linear or logistic regression, by backprop and on a linear synthetic gradient with exact line search.

    Args:
        kind: Of the data, see `artificial_data`.
        features: Number of inputs.
        loss: "mse" or "log".
        rows: Number of rows.
        steps: Number of iterations.
        learning_rate: The net's.
        seed: Of the data.

    Returns:
        Losses at the end (`loss_backprop`, `loss_sg`), their difference (`gap`), the SG error at the end,
        root mean square over rows (`sg_error`), and the synthetic gradient there (`sg_a`, `sg_b`, `sg_c`).
    """
    x, y = artificial_data(kind, features, rows, seed)
    taught = regress(x, y, loss=loss, teacher="true", steps=steps, learning_rate=learning_rate)
    run = regress(x, y, loss=loss, steps=steps, learning_rate=learning_rate)
    found = {f"sg_{name.lower()}": float(value) for name, value in run.synthesizer._asdict().items()}
    return _compared(taught.losses, run.losses) | {"sg_error": float(run.sg_errors[-1])} | found


def deep_linear_dynamics(
    kind: Kind,
    features: int,
    loss: LossName,
    rows: int = 400,
    hidden_layers: int = 10,
    steps: int = 4000,
    learning_rate: float = 1e-3,
    sg_learning_rate: float = 1e-2,
    seed: int = 0,
) -> Figures:
    """A deep linear net, by backprop and with a linear synthetic gradient in its middle, with Adam.

    Args:
        kind: Of the data, see `artificial_data`.
        features: Number of inputs.
        loss: "mse" or "log".
        rows: Number of rows.
        hidden_layers: Number of hidden layers, of two units each.
        steps: Number of steps.
        learning_rate: The net's, falling to zero.
        sg_learning_rate: The synthetic gradient's, falling to zero.
        seed: Of the data and the weights.

    Returns:
        Losses as in `linear_dynamics`, `sg_error` over the norm of the true gradient, and how far from
        critical the ends are, in units of the mean loss of a row (`Stationarity`): `residual_joint` for net
        and synthetic gradient, `residual_original` for backprop at the same point, `residual_backprop` where
        backprop's own training ended.
    """
    x, y = artificial_data(kind, features, rows, seed)
    train = partial(
        train_deep_linear,
        x,
        y,
        loss=loss,
        hidden_layers=hidden_layers,
        steps=steps,
        learning_rate=learning_rate,
        sg_learning_rate=sg_learning_rate,
        seed=seed,
    )
    taught, run = train(teacher="true"), train()
    assert run.sg_error is not None
    return _compared(taught.losses, run.losses) | {
        "sg_error": run.sg_error,
        "residual_joint": float(run.stationarity.joint),
        "residual_original": float(run.stationarity.original),
        "residual_backprop": float(taught.stationarity.original),
    }


def _compared(backprop: Tensor, synthetic: Tensor) -> dict[str, float]:
    true, given = float(backprop[-1]), float(synthetic[-1])
    return {"loss_backprop": true, "loss_sg": given, "gap": given - true}


def implicit_losses(
    kind: Kind,
    loss: LossName,
    cuts: Cuts = "one",
    steps: int = 600,
    comparisons: int = 10,
    drawn: Sequence[int] = (),
    rows: int = 400,
    side: int = 20,
    hidden_layers: int = 6,
    width: int = 16,
    learning_rate: float = 3e-3,
    sg_learning_rate: float = 1e-2,
    seed: int = 0,
) -> Figures:
    """Train a ReLU net on points of a plane with linear synthetic gradients that see the label.

    While it learns, the losses that they implement are compared with the true one over the plane.

    Args:
        kind: Of the data, see `artificial_data`.
        loss: "mse" (half the squared distance to one-hot labels) or "log" (cross-entropy).
        cuts: "one" below the output layer, or "everywhere" between two layers.
        steps: Number of steps on all rows, with Adam.
        comparisons: How often losses are compared, at equal distances, the last at the end.
        drawn: Which comparisons, counted from 1, are in the picture.
        rows: Number of rows.
        side: Points of the plane along each side.
        hidden_layers: Number of hidden layers.
        width: Their width.
        learning_rate: The net's.
        sg_learning_rate: The synthetic gradients'.
        seed: Of the data and the weights.

    Returns:
        Curves with an entry for each comparison, at the steps in `step`: `train_loss` and `train_accuracy`,
        and by hidden layer (`correlation_1` is the lowest) the correlation of the implicit loss above it with
        the true one within each class, averaged over classes, and whether it is a loss, and bounded below:
        `curl_1` and `smallest_eigenvalue_1` (`Conservation`). The picture is `losses`: the true loss, and
        those implemented above each hidden layer.
    """
    x, y = artificial_data(kind, 2, rows, seed, torch.float32)
    labels, points, losses = y.squeeze(1).long(), plane((-2.5, -2.5), (2.5, 2.5), side), CLASS_LOSSES[loss]
    model = _relu_net(hidden_layers, width, seed)
    names = [name for name, _ in model.named_children()][:-1]
    engine = DNIEngine(
        model,
        names if cuts == "everywhere" else names[-1:],
        partial(LinearEstimator, num_classes=2),
        estimator_optimizer=partial(torch.optim.Adam, lr=sg_learning_rate),
        seed=seed,
    )
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    curves: dict[str, list[float]] = {"step": [], "train_loss": [], "train_accuracy": []}
    kept = {}
    with engine:
        for number in range(1, comparisons + 1):
            output = _descend(engine, model, optimizer, (x, labels), losses, steps // comparisons)
            surfaces = loss_surfaces(model, engine.estimators, points, 2, losses)
            for name, found in surfaces.correlations().items():
                field = conservation_of(engine.estimators[name], x.new_zeros(1, width))
                at = {"correlation": found.mean(), **field._asdict()}
                for figure, value in at.items():
                    curves.setdefault(name.replace("layer", figure), []).append(float(value))
            curves["step"].append(number * (steps // comparisons))
            curves["train_loss"].append(float(losses(output, labels).mean()))
            curves["train_accuracy"].append(float((output.argmax(1) == labels).double().mean()))
            if number in drawn:
                kept[f"step {curves['step'][-1]}"] = surfaces
    title = f"True loss ({loss}, {kind} labels) and those implemented above hidden layers, dark is low"
    return curves | ({"losses": draw_loss_surfaces(kept, title)} if kept else {})


def _relu_net(hidden_layers: int, width: int, seed: int) -> nn.Sequential:
    """From two inputs to the scores of two classes; hidden layers are called `layer_1` and so on."""
    sizes = [2, *[width] * hidden_layers]
    with seeded(seed, torch.device("cpu")):
        layers: dict[str, nn.Module] = {
            f"layer_{k}": nn.Sequential(nn.Linear(a, b), nn.ReLU())
            for k, (a, b) in enumerate(pairwise(sizes), 1)
        }
        return nn.Sequential(OrderedDict(layers | {"output": nn.Linear(width, 2)}))


def _descend(
    engine: DNIEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    losses: Losses,
    steps: int,
) -> Tensor:
    """Take some steps on the whole batch; gives the output afterwards."""
    x, labels = batch
    for _ in range(steps):
        optimizer.zero_grad()
        with engine.training_step(batch):
            mean = losses(model(x), labels).mean()
        engine.backward(mean)
        optimizer.step()
        engine.update_estimators()
    with torch.no_grad():
        output: Tensor = model(x)
    return output


def stale_stages(
    method: Method,
    stages: int,
    staleness: int,
    steps: int = 600,
    rows: int = 64,
    hidden_layers: int = 8,
    width: int = 64,
    learning_rate: float = 1e-3,
    sg_learning_rate: float = 1e-3,
    seed: int = 0,
) -> Figures:
    """Train a net on digits in stages that hear from above some updates late, as a pipeline's do.

    The stages take turns in one process, with the lag of the pipeline. "cDNI" and "critic" are told their
    target `staleness` updates late; "delayed" are the gradients themselves, `staleness` updates old at the
    topmost boundary and as many older at each further one. Without a lag it is backprop.

    Args:
        method: What gives the stages their gradients.
        stages: Their number; it divides `hidden_layers`.
        staleness: The lag of one boundary, in updates.
        steps: Number of updates.
        rows: Of a batch.
        hidden_layers: Number of hidden layers, with batch normalization.
        width: Their width.
        learning_rate: The net's, with Adam.
        sg_learning_rate: The estimators'.
        seed: Of weights and batches; the split of the data is always the same.

    Returns:
        `test_error` in percent and `train_loss`, the mean over the last 50 batches.
    """
    train, _, test = DigitsDataModule().load()
    with seeded(seed, torch.device("cpu")):
        net = MLPClassifier(hidden_size=width, num_hidden=hidden_layers).net
        order = [torch.randperm(len(train.rows))[:rows] for _ in range(steps)]
    batches = [(train.inputs[train.rows[i]].flatten(1), train.targets[train.rows[i]]) for i in order]
    together = StagesTogether(
        net,
        [f"hidden_{k * hidden_layers // stages - 1}" for k in range(1, stages)],
        _estimator(method, staleness),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        partial(torch.optim.Adam, lr=learning_rate),
        batches[0],
        staleness,
        estimator_optimizer=partial(torch.optim.Adam, lr=sg_learning_rate),
        seed=seed,
    )
    losses = [float(together.step([batch])) for batch in batches]
    net.load_state_dict(together.state_dict())
    with torch.no_grad():
        scores = net.eval()(test.inputs[test.rows].flatten(1))
    wrong = (scores.argmax(1) != test.targets[test.rows]).double().mean()
    return {"test_error": 100 * float(wrong), "train_loss": sum(losses[-50:]) / len(losses[-50:])}


def _estimator(method: Method, staleness: int) -> EstimatorFactory:
    if method == "delayed":
        return partial(DelayedGradientEstimator, delay=staleness) if staleness else BackpropEstimator
    if method == "critic":
        return partial(CriticEstimator, num_classes=10, label_share=0.5)
    return partial(LinearEstimator, num_classes=10)
