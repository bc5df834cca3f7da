"""What is timed: each function is one process of a run and returns its seconds per step."""

import gc
import statistics
import time
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from stages import BATCH, WIDTH, Net, SimulatedStage, batches, loss_of
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.data import DataLoader

from lightning_dni import DNIPipelineStrategy
from lightning_dni.estimators import LinearEstimator
from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.tracing import trace_stages

TORCH = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
"""The schedules of torch.distributed.pipelining that are compared."""
WARM_UP = 6
"""Steps before the clock runs: the first one looks at the module, and the pipeline fills."""


class Clock(pl.Callback):
    """When every step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """One more step."""
        self.ends.append(time.perf_counter())


def seconds_per_step(ends: list[float]) -> float:
    """Mean seconds per step, in the steady state."""
    steady = ends[WARM_UP:]
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def trained(strategy: Any, module: pl.LightningModule, steps: int, devices: int) -> float:
    """A fit through the Trainer."""
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=[clock],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches(WARM_UP + steps), batch_size=None))  # type: ignore[arg-type]
    return seconds_per_step(clock.ends)


def pipeline(stages: int, **options: Any) -> DNIPipelineStrategy:
    """The strategy, with linear estimators."""
    return DNIPipelineStrategy(
        boundaries=[f"net.{k}" for k in range(stages - 1)],
        estimator=partial(LinearEstimator, num_classes=10),
        estimator_optimizer=partial(torch.optim.SGD, lr=1e-4),
        **options,
    )


def dni(stages: int, seconds: float, steps: int, staleness: int) -> float:
    """Synthetic gradients, through the Trainer."""
    net = Net([SimulatedStage(seconds) for _ in range(stages)])
    return trained(pipeline(stages, staleness=staleness), net, steps, stages)


class _Constant:
    """Both ends of a way on which nothing travels: what is received is always the same."""

    def __init__(self, carries: float) -> None:
        self._step, self._carries = 0, carries

    def send(self, message: Message) -> None:
        """Nothing."""

    def receive(self) -> Message:
        """A message of the size of a real one; the last figure says that no others travel along."""
        tensor = torch.full((BATCH, WIDTH), 1e-3)
        message = Message(self._step, Kind.TRAIN, (tensor,), facts=(self._carries, 0.0))
        self._step += 1
        return message


def without_messages(stages: int, seconds: float, steps: int, staleness: int) -> float:
    """The same work of a stage, in a plain loop that hears of no other process."""
    rank, net = dist.get_rank(), Net([SimulatedStage(seconds) for _ in range(stages)])
    data, stage = batches(WARM_UP + steps), stages - 1 - rank
    boundaries = [f"net.{k}" for k in range(stages - 1)]
    plan = trace_stages(net, boundaries, lambda: net.training_step(data[0]))
    engine = StageEngine(net, boundaries, partial(LinearEstimator, num_classes=10), rng="stage")
    up, down = _Constant(1.0), _Constant(0.0)
    links = Links(
        activation_in=up if stage else None,
        activation_out=up if rank else None,
        gradient_in=down if rank else None,
        gradient_out=down if stage else None,
    )
    engine.join(stage, links, staleness)
    engine.place(plan)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    gc.collect()  # as the strategy does
    ends: list[float] = []
    for batch in data:
        optimizer.zero_grad()
        with engine.training_step(batch):
            loss = engine.run(partial(net.training_step, batch))
        engine.backward(loss)
        optimizer.step()
        engine.update_estimators()
        ends.append(time.perf_counter())
    return seconds_per_step(ends)


def exact(stages: int, seconds: float, steps: int, schedule: str, microbatches: int) -> float:
    """Exact backprop on the same stages, through the Trainer."""
    net = Net([SimulatedStage(seconds) for _ in range(stages)])
    boundaries = [f"net.{k}" for k in range(stages - 1)]
    strategy = DNIPipelineStrategy(boundaries, schedule=schedule, microbatches=microbatches)
    return trained(strategy, net, steps, stages)


def torch_pipeline(stages: int, seconds: float, steps: int, schedule: str, microbatches: int) -> float:
    """torch.distributed.pipelining on the same stages, in a plain loop."""
    rank, last = dist.get_rank(), dist.get_rank() == stages - 1
    module = SimulatedStage(seconds)
    # with arguments that require a gradient, shapes are not found out by running on uninitialised memory
    row = torch.zeros(BATCH // microbatches, WIDTH, requires_grad=True)
    out = row.detach().requires_grad_()
    stage = PipelineStage(module, rank, stages, torch.device("cpu"), input_args=(row,), output_args=(out,))
    runs = TORCH[schedule](stage, microbatches, loss_fn=loss_of)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    gc.collect()  # as our strategy does
    ends: list[float] = []
    for x, y in batches(WARM_UP + steps):
        optimizer.zero_grad()
        if rank == 0:
            runs.step(x)
        elif last:
            runs.step(target=y, return_outputs=False)
        else:
            runs.step()
        optimizer.step()
        ends.append(time.perf_counter())
    return seconds_per_step(ends)


def one_process(stages: int, seconds: float, steps: int) -> float:
    """All stages in one process, by plain backprop."""
    net = nn.Sequential(*[SimulatedStage(seconds) for _ in range(stages)])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    ends: list[float] = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss_of(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ends.append(time.perf_counter())
    return statistics.mean(b - a for a, b in pairwise(ends))
