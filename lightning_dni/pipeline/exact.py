"""ExactEngine: one stage of a pipeline that trains with backprop, on several microbatches of each batch.

The stages and boundaries are those of `StageEngine`. A schedule says in which order a stage runs its forward
and backward passes; whatever the order, the gradients are those of the plain loop that accumulates over the
microbatches, bit for bit: each loss is divided by their number, and they add up from the first to the last.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.settings import Scale
from lightning_dni.core.stage import accumulate, in_place_errors
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.pipeline.crossing import gradients_at, refuse_foreign
from lightning_dni.pipeline.inbox import next_message
from lightning_dni.pipeline.message import Kind, Message
from lightning_dni.pipeline.microbatch import split_batch
from lightning_dni.pipeline.schedule import Pass, check_schedule, order
from lightning_dni.pipeline.staged import TRAINING, StagedEngine

Step = Callable[[Any], Tensor]
"""The user's training step as a function of a microbatch; gives its loss on the last stage."""


def no_estimator(spec: BoundarySpec) -> GradientEstimator:
    """Stands where estimators are made, in a pipeline that has none."""
    raise EstimatorError(
        f"Expected no estimator at {spec.name!r} under an exact schedule, but it was asked for."
    )


@dataclass(eq=False, slots=True)
class Flight:
    """A microbatch that has gone up through this stage and not yet come down.

    Attributes:
        outputs: What is to be differentiated: the tensors sent on, or the loss.
        received: The leaves from the stage below.
    """

    outputs: list[Tensor]
    received: list[Tensor]


class ExactEngine(StagedEngine):
    """Trains one stage of a model with exact backprop, beside the engines of the other stages.

    Args:
        model: As in `DNIEngine`.
        boundaries: As in `DNIEngine`.
        schedule: "1f1b" or "gpipe"; the second keeps the activations of all microbatches at a time.
        microbatches: Number of parts into which every batch is split.
        output: As in `DNIEngine`.
        rng: As in `DNIEngine`.
        seed: As in `DNIEngine`.
        exchange: Averages gradients over copies of the pipeline; None: there are no others.
        rank: Number of this copy.

    Raises:
        StageError: There is no such schedule, or `microbatches` is not a positive integer.
        BoundaryError: No pattern matches a boundary, or `output` names no submodule.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: list[str],
        *,
        schedule: str = "1f1b",
        microbatches: int = 1,
        output: str | None = None,
        rng: Literal["global", "stage"] = "global",
        seed: int | None = None,
        exchange: Exchange | None = None,
        rank: int = 0,
    ) -> None:
        check_schedule(schedule, microbatches)
        super().__init__(
            model,
            boundaries,
            no_estimator,
            output=output,
            rng=rng,
            seed=seed,
            exchange=exchange,
            rank=rank,
        )
        self.schedule, self.microbatches = schedule, microbatches

    def _reset(self) -> None:
        super()._reset()
        self._parts: list[Any] = []
        self._flights: dict[int, Flight] = {}
        self._losses: list[Tensor] = []
        self._divisor, self._closes = 1, True
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""
        super().detach()
        self._parts, self._losses, self._gradients = [], [], []
        self._flights.clear()

    @property
    def device(self) -> torch.device:
        """Where the stage computes."""
        return self._device

    # ---- one step

    def go_to(self, batch: int) -> None:
        """Number the microbatches of the next batch as if `batch` others had come before it."""
        self._steps = batch * self.microbatches

    @contextmanager
    def training_step(
        self,
        batch: Any = None,
        *,
        accumulate: int = 1,
        scale: Scale | None = None,
        several_losses: bool = False,
        first: bool = True,
        last: bool = True,
    ) -> Iterator[None]:
        """The block around one `run`, or around all passes of one batch.

        Args:
            batch: The user's batch.
            accumulate: Number of batches whose gradients add up to one update.
            scale: Must be None: a gradient scaler's factor would differ between stages.
            several_losses: Must be False.
            first: Whether the batch is the first of an update.
            last: Whether it is the last one.

        Raises:
            StageError: The batch cannot be split, or a scale or several losses are asked for.
            BoundaryError: The stage has differentiated a parameter of another stage.
        """
        if scale is not None or several_losses:
            raise StageError(
                "Expected one loss per microbatch and no gradient scaler under an exact schedule, but got "
                f"scale={scale!r}, several_losses={several_losses}. Leave them out; use bfloat16 for half "
                "precision."
            )
        self._use(TRAINING)
        self._parts = split_batch(batch, self.microbatches)
        self._divisor, self._losses, self._closes = self.microbatches * accumulate, [], last
        boundaries = [] if self._boundary is None else [self._boundary]
        with self._collecting(first), in_place_errors(boundaries):
            yield
        self._steps += self.microbatches

    @contextmanager
    def _collecting(self, first: bool) -> Iterator[None]:
        """Let gradients add up in `.grad`; set those of an update's first batch aside.

        A Trainer clears `.grad` between that batch's training step and its backward pass, in which the
        gradients are put back. Other batches add to what is there, as in a plain loop.
        """
        own = [p for p in self._model.parameters() if id(p) in self._own]
        foreign = [p for p in self._model.parameters() if id(p) not in self._own]
        before = [p.grad for p in own]
        for parameter in [*own, *foreign] if first else foreign:
            parameter.grad = None
        try:
            yield
            touched = [p for p in foreign if p.grad is not None]
            refuse_foreign(touched, self._own, f"stage {self.stage}")
            self._gradients = [(p, p.grad) for p in own if p.grad is not None] if first else []
        finally:
            self._flights.clear()
            self._parts = []
            if first:
                for parameter, gradient in zip(own, before, strict=True):
                    parameter.grad = gradient

    def passes(self) -> list[Pass]:
        """What this stage has to do for one batch, in order."""
        assert self.plan is not None
        return order(self.schedule, self.stage, self.plan.stages, self.microbatches)

    def run(self, step: Step) -> Tensor | None:
        """Run all passes of one batch; the mean loss of its microbatches, None where it is not computed."""
        for each in self.passes():
            self.take(each, step)
        return self.loss

    @property
    def loss(self) -> Tensor | None:
        """Mean loss of the microbatches of the batch, on the last stage."""
        return torch.stack(self._losses).mean() if self._losses else None

    def take(self, each: Pass, step: Step) -> None:
        """Run one pass; those of the neighbours that it needs must have been run, or run in other processes.

        Raises:
            StageError: Another stage is at another microbatch, or has stopped.
        """
        if each.backward:
            self._backward(each.microbatch)
        else:
            self._forward(each.microbatch, step)

    def _forward(self, i: int, step: Step) -> None:
        passage, number = self._placed(), self._steps + i
        self.clock.step = number
        passage.receive(Kind.TRAIN, number, self._parts[i], self.moved)
        flight = self._flights[i] = Flight([], passage.received)

        def keep(outputs: list[Tensor], value: Any) -> None:
            flight.outputs = outputs

        own = partial(self._draw_own, number)
        with self._drawing(number), self.profile("pipeline.forward"):
            loss = passage.run(partial(step, self._parts[i]), Kind.TRAIN, number, keep, own)
        if loss is not None:
            self._losses.append(loss.detach())
            flight.outputs = [loss / self._divisor]

    def _backward(self, i: int) -> None:
        flight, number = self._flights.pop(i), self._steps + i
        self.clock.step = number
        outputs = (
            [(output, None) for output in flight.outputs]
            if self.is_last
            else self._from_above(flight, number)
        )
        with self.profile("pipeline.backward"):
            if outputs:
                torch.autograd.backward([o for o, _ in outputs], [g for _, g in outputs])
        if flight.received:
            assert self._links.gradient_out is not None
            self._links.gradient_out.send(Message(number, Kind.TRAIN, gradients_at(flight.received)))

    def _from_above(self, flight: Flight, number: int) -> list[tuple[Tensor, Tensor | None]]:
        """The tensors that were sent on and got a gradient, each with it."""
        if not flight.outputs:  # nothing below takes a gradient, so none is sent
            return []
        message = next_message(self._links.gradient_in, number, "gradient")
        pairs = zip(flight.outputs, message.tensors, strict=True)
        return [(output, gradient) for output, gradient in pairs if gradient is not None]

    # ---- backward, as a strategy calls it around its own

    def prepare_backward(self, loss: Tensor) -> Tensor:
        """Nothing: the losses of the microbatches have been differentiated."""
        return loss

    def finish_backward(self) -> None:
        """Put the gradients that were set aside into `.grad`."""
        accumulate(self._gradients)
        self._gradients = []
        if self._exchange is not None and self._closes:
            self._exchange.average([p for p in self._model.parameters() if id(p) in self._own])

    def update_estimators(self) -> None:
        """Nothing: there are none."""

    # ---- no synthetic gradients

    @property
    def bp_lambda(self) -> dict[str, float]:
        """Empty: no boundary has a synthetic gradient."""
        return {}

    @property
    def skipped(self) -> dict[str, int]:
        """Empty: there are no estimators."""
        return {}

    def set_bp_lambda(self, value: float | Mapping[str, float]) -> None:
        """There is none to set.

        Raises:
            EstimatorError: Always.
        """
        self._refuse("bp_lambda")

    def request_probe(self, instrument: Instrument | None = None) -> None:
        """There is nothing to compare with.

        Raises:
            EstimatorError: Always.
        """
        self._refuse("a probe of them")

    def _refuse(self, what: str) -> NoReturn:
        raise EstimatorError(
            f"Expected synthetic gradients for {what}, but schedule={self.schedule!r} trains with exact "
            "ones. Pass schedule='dni', or leave that out."
        )

    def describe(self) -> dict[str, object]:
        """The configuration in primitives."""
        return {
            "boundaries": list(self._modules),
            "stages": len(self._modules) + 1,
            "schedule": self.schedule,
            "microbatches": self.microbatches,
            "rng": self._rng,
            "seed": self._pool.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: how many microbatches have drawn random numbers."""
        return {"version": 1, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._steps = state["steps"]
