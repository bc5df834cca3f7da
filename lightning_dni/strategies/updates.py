"""Immediate and sparse updates under a Trainer: what goes with them, and the user's optimizer in parts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lightning_dni.core.base import Engine
from lightning_dni.core.immediate import SplitOptimizer
from lightning_dni.strategies._compat import MisconfigurationException, Precision, replace_on
from lightning_dni.strategies.options import DNIOptions

REMEDY = "Pass update='step'."


class TrainerUpdates(SplitOptimizer):
    """The user's optimizer a stage at a time, after the Trainer's clipping by value.

    Args:
        optimizer: The user's.
        clip_value: What `gradient_clip_val` says; None or 0 for no clipping.
    """

    def __init__(self, optimizer: Optimizer, clip_value: float | None) -> None:
        super().__init__(optimizer)
        self._clip_value = clip_value

    def update(self, parameters: Sequence[Tensor]) -> None:
        """Clip, and let the optimizer step as if it had these parameters only."""
        if self._clip_value:
            torch.nn.utils.clip_grad_value_(parameters, self._clip_value)
        super().update(parameters)


def clip_values_if_any(plugin: Precision) -> Callable[[], None]:
    """Have `plugin` clip by value only where there is a gradient; returns what takes it back.

    torch fails where there is none, as when all stages sit a step out, or have stepped.
    """
    clip = plugin.clip_grad_by_value

    def clip_grad_by_value(optimizer: Optimizer, clip_val: float) -> None:
        if any(parameter.grad is not None for parameter in plugin.main_params(optimizer)):
            clip(optimizer, clip_val)

    return replace_on(plugin, "clip_grad_by_value", clip_grad_by_value)


def refuse_updates(
    trainer: pl.Trainer, module: pl.LightningModule, optimizers: Iterable[Any], engine: Engine
) -> None:
    """Refuse what does not go with immediate updates, or with sparse ones.

    Args:
        trainer: Its options and callbacks.
        module: The user's module.
        optimizers: The user's optimizers.
        engine: Says when stages update, and how often.

    Raises:
        MisconfigurationException: Something does not.
    """
    scaled = str(trainer.precision) == "16-mixed"
    if scaled and min(engine.update_probability.values()) < 1:
        raise MisconfigurationException(
            "Expected a precision without a gradient scaler with `update_probability` below 1, but got "
            "'16-mixed', whose scaler needs a gradient in every step. Pass precision='bf16-mixed'."
        )
    if not engine.updates_immediately:
        return
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected automatic optimization with update='immediate', but {type(module).__name__} has "
            f"automatic_optimization=False, and says itself when its optimizers step. {REMEDY}"
        )
    if scaled:
        raise MisconfigurationException(
            "Expected a precision without a gradient scaler with update='immediate', but got '16-mixed', "
            "which finds an overflow after stages have stepped. Pass precision='bf16-mixed' or update='step'."
        )
    _refuse_clipping(trainer, module)
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector, untyped)
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            "Expected no StochasticWeightAveraging with update='immediate', but got it: stages would step in "
            f"the forward passes that update batch norm for the averaged weights. {REMEDY}"
        )
    strange = [type(o).__name__ for o in optimizers if not isinstance(o, Optimizer)]
    if strange:
        raise MisconfigurationException(
            f"Expected a torch optimizer with update='immediate', but got {strange}, of which nobody knows "
            f"how to step a part. {REMEDY}"
        )


def _refuse_clipping(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        raise MisconfigurationException(
            f"Expected no clipping by the norm of all gradients with update='immediate', but got "
            f"gradient_clip_val={trainer.gradient_clip_val}: stages step before that norm is known. Pass "
            "gradient_clip_algorithm='value', or update='step'."
        )
    if type(module).configure_gradient_clipping is not pl.LightningModule.configure_gradient_clipping:
        raise MisconfigurationException(
            f"Expected Lightning's own `configure_gradient_clipping` with update='immediate', but "
            f"{type(module).__name__} has another, which no stage would wait for. {REMEDY}"
        )


def refuse_updates_apart(options: DNIOptions, strategy: str) -> None:
    """Refuse to say when and how often stages update, where each is a process of its own.

    Raises:
        MisconfigurationException: The options say it.
    """
    chances = options.update_probability
    values = chances.values() if hasattr(chances, "values") else [chances]
    told = {"update": options.update != "step", "update_probability": any(p != 1 for p in values)}
    for name, is_told in told.items():
        if is_told:
            raise MisconfigurationException(
                f"Expected no `{name}` under strategy={strategy!r}, but got {getattr(options, name)!r}: "
                "every stage is a process that updates by itself, in every batch. Leave it out, or train "
                "under strategy='dni'."
            )


def refuse_replicas(options: DNIOptions, processes: int) -> None:
    """Refuse immediate updates where gradients are averaged over processes.

    Raises:
        MisconfigurationException: They are asked for.
    """
    if options.update == "immediate":
        raise MisconfigurationException(
            f"Expected update='step' with {processes} processes, but got 'immediate': every stage would wait "
            "in the forward pass until its gradients are averaged. Leave `update` out, or train under "
            "strategy='dni' on one device."
        )
