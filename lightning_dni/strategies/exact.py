"""Exact backprop in a pipeline, as a strategy runs it: its options, one batch, what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_dni.core.exchange import Exchange
from lightning_dni.pipeline.exact import ExactEngine
from lightning_dni.pipeline.microbatch import split_batch
from lightning_dni.pipeline.schedule import EXACT, in_flight, is_count
from lightning_dni.strategies._compat import MisconfigurationException, log_as_batch
from lightning_dni.strategies.options import DNIOptions, passed

SYNTHETIC = "dni"
"""The schedule of synthetic gradients."""

DEFAULT_STALENESS = 2

RUNS_ON = 2
"""Messages that a stage may be ahead of its neighbour beyond what the schedule asks for."""


@dataclass(frozen=True)
class ExactSchedule:
    """How a pipeline trains with exact backprop.

    Attributes:
        schedule: "1f1b" or "gpipe".
        microbatches: Number of parts into which every batch is split.
    """

    schedule: str
    microbatches: int

    @classmethod
    def of(
        cls, schedule: str, microbatches: int, staleness: int, given: Mapping[str, Any]
    ) -> "ExactSchedule | None":
        """What the user asks for; None for synthetic gradients.

        Args:
            schedule: As in `DNIPipelineStrategy`.
            microbatches: As in `DNIPipelineStrategy`.
            staleness: As in `DNIPipelineStrategy`.
            given: The arguments of `DNIOptions` as the user gave them.

        Raises:
            MisconfigurationException: There is no such schedule, or other arguments do not go with it.
        """
        if schedule == SYNTHETIC:
            if microbatches != 1:
                raise MisconfigurationException(
                    f"Expected `microbatches` with schedule='1f1b' or 'gpipe' only, but got {microbatches!r} "
                    "with schedule='dni', which needs none. Leave it out, or choose the schedule."
                )
            return None
        if schedule not in EXACT:
            raise MisconfigurationException(
                f"Expected `schedule` to be 'dni', '1f1b' or 'gpipe', but got {schedule!r}. Leave it out for "
                "synthetic gradients, or pass '1f1b' for exact ones."
            )
        if not is_count(microbatches):
            raise MisconfigurationException(
                f"Expected `microbatches` to be an integer of at least 1, but got {microbatches!r}. Pass a "
                "few times the number of stages, and at most the rows of a batch."
            )
        strange = [n for n in passed(given) if n not in ("boundaries", "output", "rng")]
        strange += ["staleness"] if staleness != DEFAULT_STALENESS else []
        if strange:
            raise MisconfigurationException(
                f"Expected no arguments about synthetic gradients with schedule={schedule!r}, but got "
                f"{strange}. Leave them out, or pass schedule='dni'."
            )
        return cls(schedule, microbatches)

    def build(
        self, module: pl.LightningModule, options: DNIOptions, seed: int, exchange: Exchange | None, rank: int
    ) -> ExactEngine:
        """The engine of a stage, in the copy of the pipeline with number `rank`."""
        return ExactEngine(
            module,
            options.boundaries,
            schedule=self.schedule,
            microbatches=self.microbatches,
            output=options.output,
            rng=options.rng,
            seed=seed,
            exchange=exchange,
            rank=rank,
        )

    def window(self, stages: int) -> int:
        """Number of messages that may be under way between two stages."""
        return in_flight(self.schedule, 0, stages, self.microbatches) + RUNS_ON

    def first_part(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of a training step, for its first microbatch."""
        return (split_batch(args[0] if args else None, self.microbatches)[0], *args[1:])


def refuse_own_backward(module: pl.LightningModule) -> None:
    """Refuse a module that differentiates the loss itself.

    Raises:
        MisconfigurationException: It does.
    """
    if type(module).backward is not pl.LightningModule.backward:
        raise MisconfigurationException(
            f"Expected Lightning's own `backward` under an exact schedule, but {type(module).__name__} has "
            "one, which would see none of the losses of the microbatches. Use hooks on parameters."
        )


def run_schedule(
    engine: ExactEngine, module: pl.LightningModule, step: Callable[..., Any], args: Sequence[Any]
) -> STEP_OUTPUT:
    """Run the user's training step, and the backward pass, on every microbatch of a batch.

    Args:
        engine: The engine, inside its `training_step`.
        module: The user's module.
        step: The user's training step.
        args: What the step is given for the whole batch.

    Returns:
        The mean loss, which is differentiated already, in the form in which the step returns it; other
        things that it returns are in lists, one entry per microbatch. Zero where there is no loss.
    """
    outputs: list[Any] = []

    def run_one(part: Any) -> Tensor:
        log_as_batch(module.trainer, part)
        outputs.append(step(part, *args[1:]))
        return _loss_of(outputs[-1])

    # the number of the batch is in every checkpoint of a Trainer, so random streams go on after a restart
    engine.go_to(module.trainer.fit_loop.total_batch_idx)
    loss = engine.run(run_one)
    log_as_batch(module.trainer, args[0])
    if loss is None:  # Lightning differentiates what it is given
        return torch.zeros((), device=engine.device, requires_grad=True)
    loss.requires_grad_()
    if not isinstance(outputs[0], Mapping):
        return loss
    return {key: loss if key == "loss" else [output[key] for output in outputs] for key in outputs[0]}


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            "Expected `training_step` to return a loss, or a dict with one under 'loss', for every "
            f"microbatch, but got {type(loss).__name__}. Stages cannot skip a batch: return the loss times 0."
        )
    return loss
