"""One training, and what a step of it costs."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from rows import ESTIMATOR_STEPS, Net
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_dni import DNIStrategy, GradientMonitor
from lightning_dni.core import DNIEngine, EstimatorFactory
from lightning_dni.errors import DNIError

ADAM = partial(torch.optim.Adam, fused=True)
FIGURES = {
    "sg_error": "dni_sg_error",
    "weight_error": "dni_weight_error",
    "cosine": "dni_true_gradient_cosine",
}
STEPS_PER_TURN, WARM_UP, PROFILED = 4, 5, 10


class Setting(NamedTuple):
    """What a training is told beside its net and its row.

    Attributes:
        depth: Number of hidden layers or blocks.
        rate: Learning rate of the net.
        estimator_rate: That of the estimators.
        steps: Number of steps.
        seed: Of weights, batches and estimators.
        estimator_steps: Steps of the estimators per step of the net.
    """

    depth: int
    rate: float
    estimator_rate: float
    steps: int
    seed: int
    estimator_steps: int = 1


def train(
    net: Net,
    factory: EstimatorFactory | None,
    setting: Setting,
    data: pl.LightningDataModule,
    final: bool,
) -> dict[str, float]:
    """Train one net.

    Args:
        net: The net.
        factory: Makes estimators; None is backprop.
        setting: Rates, steps and seed.
        data: Its data, loaded once for all trainings.
        final: Read the test set, and compare with true gradients meanwhile.

    Returns:
        Errors in percent (100 where training has diverged), the figures of `GradientMonitor` as means over
        boundaries and the last ten probes, and seconds.
    """
    pl.seed_everything(setting.seed, verbose=False)
    model = net.model(setting.depth, setting.rate)
    monitors = [GradientMonitor(max(1, setting.steps // 20), summary=False)] if final and factory else []
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=setting.steps,
        accelerator="cpu",
        devices=1,
        strategy="auto" if factory is None else _strategy(net, factory, setting),
        callbacks=list(monitors),
        default_root_dir=tempfile.gettempdir(),  # where the monitor's picture goes
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    began = time.perf_counter()
    try:
        trainer.fit(model, data)
    except DNIError:  # something was not finite
        errors = dict.fromkeys(("val_error", "test_error") if final else ("val_error",), 100.0)
        return {**errors, "seconds": time.perf_counter() - began}
    found = {"seconds": time.perf_counter() - began}
    trainer.limit_val_batches = 1.0
    found |= trainer.validate(model, data, verbose=False)[0]
    if final:
        found |= trainer.test(model, data, verbose=False)[0]
    return found | _figures(monitors[0] if monitors else None)


def _strategy(net: Net, factory: EstimatorFactory, setting: Setting) -> DNIStrategy:
    return DNIStrategy(
        net.boundaries,
        factory,
        estimator_optimizer=partial(ADAM, lr=setting.estimator_rate),
        estimator_steps=setting.estimator_steps,
        loss_denominator=net.denominator,
    )


def _figures(monitor: GradientMonitor | None) -> dict[str, float]:
    if monitor is None:
        return {}
    recent = monitor.state_dict()["recent"]
    found = {}
    for name, metric in FIGURES.items():
        values = [v for key, last in recent.items() if key.startswith(f"{metric}/") for v in last]
        found[name] = statistics.fmean(values)
    return found


class CountFlops(TorchDispatchMode):
    """Adds up what torch's formulas say of every operation.

    `FlopCounterMode` also tracks modules, with hooks that forbid a gradient in the middle of a forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._overloadpacket.__name__.removesuffix("_")  # addmm_ counts as addmm
        formula = flop_registry.get(getattr(torch.ops.aten, name, None))
        self.total += 0 if formula is None else formula(*args, **kwargs, out_val=result)
        return result


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
        parameters: Of all estimators.
        flops: Of a step: products of matrices and convolutions.
        peak: Most bytes alive: weights, optimizers' state, gradients, activations; without the batch.
        time: Over that of backprop's steps beside it, median of turns.
        low: The same, 10 % of the turns are below.
        high: The same, 10 % of the turns are above.
    """

    parameters: int
    flops: int
    peak: int
    time: float
    low: float
    high: float


def costs(
    net: Net, rows: dict[str, EstimatorFactory | None], depth: int, data: pl.LightningDataModule, turns: int
) -> dict[str, Cost]:
    """Costs of all rows; their steps take turns, so that each ratio is between neighbours in time."""
    data.prepare_data()
    data.setup()
    batches = list(itertools.islice(data.train_dataloader(), 64))
    loops = {
        name: partial(_loop, net, factory, depth, batches, ESTIMATOR_STEPS.get(name, 1))
        for name, factory in rows.items()
    }
    contenders = {name: loop() for name, loop in loops.items()}
    times = _take_turns(contenders, turns)
    found = {}
    for name in rows:
        ratios = [own / backprop for own, backprop in zip(times[name], times["backprop"], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios
        engine = next(contenders[name])
        learned = [] if engine is None else [p for e in engine.estimators.values() for p in e.parameters()]
        found[name] = Cost(
            sum(p.numel() for p in learned),
            _flops(contenders[name]),
            _peak(loops[name]()),
            statistics.median(ratios),
            low,
            high,
        )
    for contender in contenders.values():
        contender.close()
    return found


def _take_turns(contenders: dict[str, Iterator[object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of some steps."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + turns):
        for name, contender in contenders.items():
            began = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                next(contender)
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    return times


def _loop(
    net: Net,
    factory: EstimatorFactory | None,
    depth: int,
    batches: list[tuple[Tensor, Tensor]],
    estimator_steps: int,
) -> Iterator[DNIEngine | None]:
    """Train in a plain loop; gradients are gone between two steps."""
    torch.manual_seed(0)
    model = net.model(depth, 1e-3)
    optimizer = ADAM(model.parameters(), lr=1e-3)
    if factory is None:
        for x, y in itertools.cycle(batches):
            _loss(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield None
    engine = DNIEngine(
        model,
        net.boundaries,
        factory,
        estimator_optimizer=partial(ADAM, lr=1e-3),
        estimator_steps=estimator_steps,
        loss_denominator=net.denominator,
    )
    with engine:
        for x, y in itertools.cycle(batches):
            with engine.training_step((x, y)):
                loss = _loss(model, x, y)
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
            optimizer.zero_grad()
            yield engine


def _loss(model: pl.LightningModule, x: Tensor, y: Tensor) -> Tensor:
    scores = model(x)
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def _flops(contender: Iterator[object]) -> int:
    with CountFlops() as counter:
        next(contender)
    return counter.total


def _peak(contender: Iterator[object]) -> int:
    """Most bytes alive in the first steps, counted from before there was a net."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(PROFILED):
            next(contender)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    contender.close()
    return max(itertools.accumulate(change for _, change in changes))
