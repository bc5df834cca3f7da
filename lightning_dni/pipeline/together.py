"""All stages of a pipeline in one process, taking turns: the same stages, without the processes."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dni.core.pool import EstimatorFactory
from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.pipeline.exact import ExactEngine
from lightning_dni.pipeline.local import LocalChannel
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.schedule import turns
from lightning_dni.pipeline.tracing import trace_stages


class StagesTogether:
    """Runs the stages of a model one after another, each on a copy of the model, for tests and debugging.

    Args:
        model: The whole model; it is copied.
        boundaries: Submodule names or patterns.
        estimator: As in `DNIEngine`.
        loss_of: Gives the loss of a model on a batch, as a training step does.
        optimizer: Makes an optimizer from a model's parameters.
        batch: Any batch, to see what belongs to which stage.
        staleness: Number of updates after which an estimator learns from a target gradient.
        options: Further arguments of `DNIEngine`.

    Attributes:
        engines: One per stage, from the one that is given the batch upwards.
        models: The copy that each of them trains its part of.

    Raises:
        BoundaryError: The model cannot be cut there.
        StageError: A parameter is used in two stages.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: Sequence[str],
        estimator: EstimatorFactory | Mapping[str, EstimatorFactory],
        loss_of: Callable[[nn.Module, Any], Tensor],
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        batch: Any,
        staleness: int = 0,
        **options: Any,
    ) -> None:
        probed = copy.deepcopy(model)
        self.plan = trace_stages(
            probed, boundaries, lambda: loss_of(probed, batch), output=options.get("output")
        )
        self._loss_of = loss_of
        stages = range(self.plan.stages)
        self.models = [copy.deepcopy(model) for _ in stages]
        self.engines = [StageEngine(m, boundaries, estimator, rng="stage", **options) for m in self.models]
        for stage, (engine, links) in enumerate(zip(self.engines, _links(self.plan.stages), strict=True)):
            engine.join(stage, links, staleness)
            engine.place(self.plan)
        self.optimizers = [optimizer(m.parameters()) for m in self.models]

    def step(self, batches: Sequence[Any]) -> Tensor:
        """One update of every stage on `batches`, whose losses are averaged; returns the last loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = None
        for i, batch in enumerate(batches):
            loss = self._pass(batch, len(batches), first=i == 0)
        for engine, optimizer in zip(reversed(self.engines), reversed(self.optimizers), strict=True):
            optimizer.step()
            engine.update_estimators()
        assert loss is not None
        return loss

    def _pass(self, batch: Any, accumulate: int, first: bool) -> Tensor:
        losses: list[Tensor | None] = []
        for engine, model in zip(self.engines, self.models, strict=True):
            with engine.training_step(batch, accumulate=accumulate, first=first):
                losses.append(engine.run(partial(self._share, model, batch, accumulate)))
        for engine, loss in zip(reversed(self.engines), reversed(losses), strict=True):
            engine.backward(loss)
        assert losses[-1] is not None
        return losses[-1].detach() * accumulate

    def _share(self, model: nn.Module, batch: Any, accumulate: int) -> Tensor:
        return self._loss_of(model, batch) / accumulate

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole model, each from the stage that trains it."""
        return _whole(self.plan, self.models)


class ExactStagesTogether:
    """Runs the stages of a model under a schedule of exact backprop, each on a copy of the model.

    Args:
        model: The whole model; it is copied.
        boundaries: Submodule names or patterns.
        loss_of: Gives the loss of a model on a batch, as a training step does.
        optimizer: Makes an optimizer from a model's parameters.
        batch: Any batch, to see what belongs to which stage.
        options: Further arguments of `ExactEngine`.

    Attributes:
        engines: One per stage, from the one that is given the batch upwards.
        models: The copy that each of them trains its part of.

    Raises:
        BoundaryError: The model cannot be cut there.
        StageError: A parameter is used in two stages, or there is no such schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: Sequence[str],
        loss_of: Callable[[nn.Module, Any], Tensor],
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
        batch: Any,
        **options: Any,
    ) -> None:
        probed = copy.deepcopy(model)
        self.plan = trace_stages(
            probed, boundaries, lambda: loss_of(probed, batch), output=options.get("output"), skips=True
        )
        self._loss_of = loss_of
        self.models = [copy.deepcopy(model) for _ in range(self.plan.stages)]
        self.engines = [ExactEngine(m, list(boundaries), rng="stage", **options) for m in self.models]
        for stage, (engine, links) in enumerate(zip(self.engines, _links(self.plan.stages), strict=True)):
            engine.join(stage, links, 0)
            engine.place(self.plan)
        self.optimizers = [optimizer(m.parameters()) for m in self.models]

    def step(self, batches: Sequence[Any]) -> list[Tensor]:
        """One update of every stage on `batches`, each split into microbatches; returns their mean losses."""
        losses: list[Tensor] = []
        for i, batch in enumerate(batches):
            with ExitStack() as steps:
                for engine in self.engines:
                    steps.enter_context(engine.training_step(batch, accumulate=len(batches), first=i == 0))
                self._take_turns()
            if i == 0:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
            for engine in self.engines:
                engine.finish_backward()
            losses.append(cast(Tensor, self.engines[-1].loss))
        for optimizer in self.optimizers:
            optimizer.step()
        return losses

    def _take_turns(self) -> None:
        schedule, microbatches = self.engines[0].schedule, self.engines[0].microbatches
        for stage, passed in turns(schedule, self.plan.stages, microbatches):
            self.engines[stage].take(passed, partial(self._loss_of, self.models[stage]))

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole model, each from the stage that trains it."""
        return _whole(self.plan, self.models)


def _whole(plan: StagePlan, models: Sequence[nn.Module]) -> dict[str, Tensor]:
    states = [model.state_dict() for model in models]
    return {name: states[plan.owner(name)][name] for name in states[0]}


def _links(stages: int) -> list[Links]:
    ways = [[LocalChannel(f"{what} at boundary {k}") for k in range(stages + 1)] for what in KINDS]
    up, down, out = ways
    return [
        Links(
            activation_in=up[k] if k else None,
            activation_out=up[k + 1] if k < stages - 1 else None,
            gradient_in=down[k + 1] if k < stages - 1 else None,
            gradient_out=down[k] if k else None,
            output_in=out[k + 1] if k < stages - 1 else None,
            output_out=out[k] if k else None,
        )
        for k in range(stages)
    ]


KINDS = ("activation", "target gradient", "network output")
