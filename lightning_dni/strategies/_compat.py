"""Every Lightning name that is not documented for users, each with a canary in the tests."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.apply_func import convert_to_tensors
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    Callback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging,)
if hasattr(callbacks, "WeightAveraging"):  # older Lightning has none
    AVERAGING = (*AVERAGING, callbacks.WeightAveraging)

__all__ = [
    "AVERAGING",
    "CombinedLoader",
    "LightningEnvironment",
    "MisconfigurationException",
    "Precision",
    "SIGTERMException",
    "StrategyRegistry",
    "TrainerFn",
    "alone",
    "clip_norms_by",
    "drop_logged_values",
    "follow",
    "follow_batches",
    "free_timer",
    "load_shards",
    "log_as_batch",
    "mark_sigterm",
    "metric_state",
    "metrics_in",
    "move_data_to_device",
    "mute_saving",
    "note_sigterm",
    "prepared",
    "quiet_copy",
    "rank_zero_info",
    "rank_zero_warn",
    "replace_on",
    "saves_at_step",
    "say_device",
    "set_metric_state",
    "training_data",
    "validates_by_time",
    "waits_in_every_batch",
    "worker_seeding",
]


def quiet_copy(module: pl.LightningModule, hear: Callable[..., None], copies: int = 1) -> pl.LightningModule:
    """A copy that knows its Trainer, tells `hear` what it logs, and waits for no other process.

    Its metrics see this process only, and it gathers `copies` times what it has itself.
    """
    groups = {id(metric.process_group): None for metric in metrics_in(module)}
    twin = copy.deepcopy(module, groups)  # leaves the trainer out, and groups, which cannot be copied
    twin.__dict__["_trainer"] = module._trainer
    for metric in metrics_in(twin):
        metric.distributed_available_fn = alone
    twin.__dict__["log"] = twin.__dict__["log_dict"] = hear
    twin.__dict__["all_gather"] = partial(_gather_alone, twin, copies)
    return twin


def _gather_alone(module: pl.LightningModule, copies: int, data: Any, *args: Any, **kwargs: Any) -> Any:
    """What `all_gather` gives where every one of `copies` processes has the same."""
    data = convert_to_tensors(data, device=module.device)
    return data if copies == 1 else tree_map(lambda x: torch.stack([x] * copies), data)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that `torch.distributed.checkpoint` has written into a folder, by name, on the CPU."""
    return _load_distributed_checkpoint(folder)


def training_data(trainer: pl.Trainer) -> Any:
    """The loader, or loaders, that the user gives for training, as they are."""
    return trainer.fit_loop._data_source.dataloader()


def prepared(module: pl.LightningModule, batch: Any, precision: Precision) -> Any:
    """What a loop makes of a batch before it is given to a step, for a module on the CPU."""
    batch = module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, torch.device("cpu"), dataloader_idx=0)


def say_device(module: pl.LightningModule, device: torch.device) -> None:
    """Have the user's code believe that all of `module` is on `device`; metrics really are."""
    for part in module.modules():
        if isinstance(part, pl.LightningModule):
            part._device = device
        elif isinstance(part, Metric):
            part.to(device)


class _NoResults(_ResultCollection):
    """Takes what a stage without a loss logs, and keeps none of it."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""


def drop_logged_values(trainer: pl.Trainer) -> None:
    """Have this process log nothing: what it has to say would overwrite what the last stage says."""
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop._results = _NoResults(training=True)
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop._results = _NoResults(training=False)


def log_as_batch(trainer: pl.Trainer, batch: Any) -> None:
    """Have values that are logged from now on count with the rows of `batch` in the mean of the epoch."""
    results = trainer._results
    if results is not None:
        results.batch, results.batch_size = batch, None


def replace_on(owner: object, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Have `owner.name` be `function`, for this object only; returns what takes it back."""
    vars(owner)[name] = function
    return lambda: vars(owner).pop(name, None)


def follow(owner: object, name: str, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` after every `owner.name(...)` that returns; returns what takes it back."""
    method = getattr(owner, name)

    def followed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then()
        return result

    return replace_on(owner, name, followed)


def follow_batches(
    trainer: pl.Trainer, batch: Callable[[], None], end: Callable[[], None], epoch: Callable[[], None]
) -> list[Callable[[], None]]:
    """Call these after every training batch, after the validation that may follow it, and after an epoch."""
    fit_loop = trainer.fit_loop
    return [
        follow(fit_loop.epoch_loop, "advance", batch),
        follow(fit_loop.epoch_loop, "on_advance_end", end),
        follow(fit_loop, "on_advance_end", epoch),
    ]


def note_sigterm(trainer: pl.Trainer, note: Callable[[], None]) -> list[Callable[[], None]]:
    """Have a SIGTERM noted in this process only; Lightning broadcasts it, and asks for it in every batch."""
    launcher: Any = trainer.strategy.launcher

    def noted(signum: Any, frame: Any) -> None:
        if launcher is not None:
            launcher.kill(signum)  # to the processes that this one has started, as Lightning does
        note()

    loop = trainer.fit_loop.epoch_loop
    return [
        replace_on(trainer._signal_connector, "_sigterm_notifier_fn", noted),
        replace_on(loop, "_broadcast_sigterm_tensor", lambda: None),
    ]


def mark_sigterm(trainer: pl.Trainer) -> None:
    """Have the loops raise SIGTERMException where they look next."""
    trainer._signal_connector.received_sigterm = True


def free_timer(timer: Timer, expired: Callable[[], None]) -> list[Callable[[], None]]:
    """Have `timer` look at the clock of this process only, not at that of rank 0, in every batch."""
    if timer._interval != "step":
        return []

    def look(*args: Any, **kwargs: Any) -> None:
        left = timer.time_remaining()
        if left is not None and left <= 0:
            expired()

    return [replace_on(timer, "on_train_batch_end", look)]


def clip_norms_by(plugin: Precision, clip: Callable[[list[torch.Tensor], float], None]) -> Callable[[], None]:
    """Have `clip(parameters, max_norm)` clip gradients by norm; returns what takes it back."""

    def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
        clip(list(plugin.main_params(optimizer)), float(clip_val))

    return replace_on(plugin, "clip_grad_by_norm", clip_grad_by_norm)


def saves_at_step(callback: Callback, step: int) -> bool:
    """Whether `callback` writes a checkpoint after optimizer step `step`; its name may have values."""
    if not isinstance(callback, ModelCheckpoint):
        return False
    every = callback._every_n_train_steps
    return every > 0 and step % every == 0


def waits_in_every_batch(callback: Callback) -> bool:
    """Whether `callback` asks all processes in every batch whether it is time."""
    return isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None


def validates_by_time(trainer: pl.Trainer) -> bool:
    """Whether the clock of each process says when it validates."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def mute_saving(callbacks: Iterable[Callback]) -> tuple[list[str], list[Callable[[], None]]]:
    """Keep callbacks from saving upon an exception: their names, and what takes that back."""
    savers = [
        c for c in callbacks if isinstance(c, OnExceptionCheckpoint) or getattr(c, "save_on_exception", False)
    ]
    undo = [replace_on(saver, "on_exception", _ignore) for saver in savers]
    return [type(saver).__name__ for saver in savers], undo


def metrics_in(module: nn.Module) -> list[Metric]:
    """The metrics among the parts of `module`."""
    return [part for part in module.modules() if isinstance(part, Metric)]


def alone() -> bool:
    """Say to a metric that there are no other processes."""
    return False


def metric_state(metric: Metric) -> tuple[dict[str, Any], int]:
    """What a metric has seen in all processes of its group, which come here alike; as its value is made."""
    held = metric.metric_state
    if metric._is_synced:
        return held, metric._update_count
    metric.sync(metric.dist_sync_fn, should_sync=metric.sync_on_compute)
    seen = metric.metric_state
    if metric._is_synced:
        metric.unsync()
        for name, value in held.items():  # not copies of it: the metrics of a collection share it
            setattr(metric, name, value)
            if isinstance(value, list) and isinstance(seen[name], torch.Tensor):
                seen[name] = [seen[name]]  # a metric appends to it
    return seen, metric._update_count


def set_metric_state(metric: Metric, state: Mapping[str, Any], updates: int) -> None:
    """Have a metric have seen what another one has."""
    for name, value in state.items():
        setattr(metric, name, move_data_to_device(value, metric.device))
    metric._update_count, metric._computed = updates, None


def worker_seeding(replica: int) -> Callable[[int], None] | None:
    """What seeds the workers of a loader after `seed_everything(workers=True)`, the same in every stage."""
    if not int(os.environ.get("PL_SEED_WORKERS", "0")):
        return None
    return partial(pl_worker_init_function, rank=replica)
