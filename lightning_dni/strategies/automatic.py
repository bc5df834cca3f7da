"""Boundaries that nobody names: one process measures the module, and all of them cut it alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dni.core.boundary import device_of, named_submodules, resolve_boundaries
from lightning_dni.pipeline.balance import Balance, balance
from lightning_dni.pipeline.keeping import same_randomness
from lightning_dni.pipeline.staged import TRAINING
from lightning_dni.strategies._compat import (
    MisconfigurationException,
    Precision,
    TrainerFn,
    rank_zero_info,
    rank_zero_warn,
    training_data,
)
from lightning_dni.strategies.options import AUTO, DNIOptions
from lightning_dni.strategies.placement import Place, Trial
from lightning_dni.strategies.sampling import one_batch

FirstPart = Callable[[Sequence[Any]], tuple[Any, ...]]
"""Gives the arguments of a training step for what is run at a time."""

Said = tuple[list[str], str, str | None]
"""What rank 0 tells the others: the boundaries, how they were chosen, or why they could not be."""


class AutomaticBoundaries:
    """Which boundaries there are where the user has said "auto".

    Args:
        stages: Number of stages of one copy of the pipeline; None: the number of processes.
    """

    def __init__(self, stages: int | None) -> None:
        self._stages = stages
        self._chosen: list[str] = []
        self._module: pl.LightningModule | None = None

    def place(self, rank: int, world_size: int, module: pl.LightningModule, options: DNIOptions) -> Place:
        """Where process `rank` stands, before boundaries are chosen.

        Raises:
            MisconfigurationException: There are not as many processes for every stage.
        """
        if options.boundaries == AUTO:
            stages = world_size if self._stages is None else self._stages
            return Place.of_stages(rank, world_size, _checked(stages, world_size))
        boundaries = tuple(resolve_boundaries(module, options.boundaries))
        if self._stages not in (None, len(boundaries) + 1):
            raise MisconfigurationException(
                f"Expected `stages` to be {len(boundaries) + 1}, one more than boundaries "
                f"{list(boundaries)}, but got {self._stages}. Leave it out where boundaries are named."
            )
        return Place.of(rank, world_size, boundaries)

    def resolve(self, module: pl.LightningModule, options: DNIOptions) -> DNIOptions:
        """The options with names in the place of "auto".

        Raises:
            MisconfigurationException: None have been chosen yet.
        """
        if options.boundaries != AUTO:
            return options
        if self._module is not module:
            raise MisconfigurationException(
                f"Expected boundaries for {type(module).__name__}, but boundaries='auto' are only chosen "
                "when `fit` begins. Call `fit` first with this strategy and module, or name the boundaries."
            )
        return replace(options, boundaries=list(self._chosen))

    def choose(
        self,
        trainer: pl.Trainer,
        options: DNIOptions,
        stages: int,
        restored: Mapping[str, Any] | None,
        first_part: FirstPart,
    ) -> None:
        """Choose once for the Trainer's module; every process calls it.

        Args:
            trainer: This process's.
            options: As the user gave them.
            stages: Number of stages.
            restored: The engine's state in the checkpoint from which the fit goes on.
            first_part: What of a step's arguments is run at a time.

        Raises:
            MisconfigurationException: On every process, where it cannot be done.
        """
        module = trainer.lightning_module
        if options.boundaries != AUTO or self._module is module:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            self.resolve(module, options)
        saved = _saved(restored, stages, module)
        if saved is not None:
            rank_zero_info(f"boundaries='auto' has taken those of the checkpoint: {saved}.")
        chosen = saved or _agree(trainer, options.output, stages, first_part)
        self._chosen, self._module = chosen, module


def _checked(stages: int, world_size: int) -> int:
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 2:
        raise MisconfigurationException(
            f"Expected at least 2 stages with boundaries='auto', but got {stages!r} for {world_size} "
            "processes. Set `devices` of the Trainer, or pass `stages=`."
        )
    if world_size % stages:
        raise MisconfigurationException(
            f"Expected a number of processes that `stages` divides, but got stages={stages} and {world_size} "
            "processes. Set `devices` and `num_nodes` of the Trainer to a multiple of it."
        )
    return stages


def _saved(restored: Mapping[str, Any] | None, stages: int, module: pl.LightningModule) -> list[str] | None:
    """The boundaries of a checkpoint, where they cut this module into as many stages."""
    names = list((restored or {}).get("boundaries", ()))
    modules = named_submodules(module)
    return names if len(names) == stages - 1 and all(n in modules for n in names) else None


def _agree(trainer: pl.Trainer, output: str | None, stages: int, first_part: FirstPart) -> list[str]:
    """What rank 0 has chosen; times would differ between processes."""
    error: Exception | None = None
    said: Said = [], "", None
    with same_randomness(device_of(trainer.lightning_module)):
        data = training_data(trainer)  # on every rank: the user's code may wait for the others there
        if trainer.is_global_zero:
            try:
                found = _choose(trainer, one_batch(data), output, stages, first_part)
                said = list(found.boundaries), found.text(), None
            except Exception as caught:
                error, said = caught, ([], "", _why(caught))
    boundaries, text, wrong = trainer.strategy.broadcast(said)
    if wrong is not None:
        raise MisconfigurationException(wrong) from error
    rank_zero_info(text)
    return boundaries


def _why(error: Exception) -> str:
    if isinstance(error, MisconfigurationException) or "boundaries='auto'" in str(error):
        return str(error)
    return (
        "Expected `training_step` to run on a first batch before training begins, where boundaries='auto' "
        f"are chosen, but got {type(error).__name__}: {error} Name the boundaries, with DNIPipelineStrategy("
        "boundaries=[...]), or make what the step needs in `__init__`, `configure_model` or `setup`."
    )


def _choose(
    trainer: pl.Trainer, batch: Any, output: str | None, stages: int, first_part: FirstPart
) -> Balance:
    module, precision = trainer.lightning_module, trainer.precision_plugin
    copies = trainer.world_size // stages
    trial = Trial(module, TRAINING, (), precision, copies=copies)
    trial.take(batch, first_part)
    measuring = _on_device(module, trial, precision, trainer.strategy.root_device, copies)
    measured = measuring if measuring is not None else trial.measure()
    return balance(module, measured, stages, lambda names: trial.plan(names, output))


def _on_device(
    module: pl.LightningModule, trial: Trial, precision: Precision, device: torch.device, copies: int
) -> Any:
    """What is measured where training runs; None on the CPU, and where the whole module is too large."""
    if device.type != "cuda":
        return None
    try:
        return Trial(module, TRAINING, trial.args, precision, device, copies).measure()
    except torch.OutOfMemoryError:
        rank_zero_warn(
            "The whole module and one batch do not fit on one device: boundaries='auto' are chosen by the "
            "times of the CPU."
        )
        return None
    finally:
        torch.cuda.empty_cache()
