"""What stages in processes of their own cannot do, said before the first batch, with the reason."""

import dis
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_dni.core.boundary import choose_by_pattern
from lightning_dni.core.pool import locks_made_by, made_by
from lightning_dni.strategies._compat import (
    AVERAGING,
    LightningEnvironment,
    MisconfigurationException,
    TrainerFn,
    rank_zero_warn,
    validates_by_time,
    waits_in_every_batch,
)
from lightning_dni.strategies.options import DNIOptions

LOCAL = ("127.0.0.1", "localhost", "::1")
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
SEES_OUTPUTS = ("on_train_batch_end", "on_validation_batch_end", "on_test_batch_end", "on_predict_batch_end")


def refuse_nodes_apart(num_nodes: int, environment: Any) -> None:
    """Refuse several nodes where nobody says how they find each other: they would wait for ever.

    Raises:
        MisconfigurationException: It is so.
    """
    # the launcher has set MASTER_ADDR by now, to this machine where the user has not
    alone = isinstance(environment, LightningEnvironment) and environment.main_address in LOCAL
    if num_nodes > 1 and alone:
        raise MisconfigurationException(
            f"Expected a cluster for num_nodes={num_nodes}, but this is no SLURM, torchrun, LSF or MPI job, "
            "and MASTER_ADDR names this machine. Start the script by torchrun or the cluster's own launcher, "
            "set MASTER_ADDR and NODE_RANK, or pass num_nodes=1."
        )


def refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule, layer_sync: Any) -> None:
    """Refuse what the stages cannot do together.

    Args:
        trainer: This process's.
        module: Its module.
        layer_sync: What `Trainer(sync_batchnorm=True)` asks for.

    Raises:
        MisconfigurationException: The Trainer or the module asks for it.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected automatic optimization under strategy='dni_pipeline', but {type(module).__name__} has "
            "automatic_optimization=False. Train it under strategy='dni' or 'dni_ddp'."
        )
    reading = [n for n in STEPS if "dataloader_iter" in inspect.signature(getattr(module, n)).parameters]
    if reading:
        raise MisconfigurationException(
            f"Expected steps that are given a batch under strategy='dni_pipeline', but {reading[0]} of "
            f"{type(module).__name__} takes `dataloader_iter`, from which a stage's trial would take what "
            "the stage itself is to read. Take `batch` and `batch_idx`, or train under strategy='dni' or "
            "'dni_ddp'."
        )
    if str(trainer.precision) == "16-mixed":
        raise MisconfigurationException(
            "Expected a precision without a gradient scaler under strategy='dni_pipeline', but got "
            "'16-mixed', whose scale would differ between stages. Pass precision='bf16-mixed'."
        )
    if layer_sync is not None:
        raise MisconfigurationException(
            "Expected sync_batchnorm=False under strategy='dni_pipeline', but got True: the processes are "
            "stages, of which each has its own batch norm layers and all rows. Leave it out."
        )
    if validates_by_time(trainer):
        raise MisconfigurationException(
            "Expected `val_check_interval` in batches or epochs under strategy='dni_pipeline', but got a "
            "time, which ends at another batch in every process. Pass a number."
        )
    _refuse_averaging(trainer)


def _refuse_averaging(trainer: pl.Trainer) -> None:
    averaging = [type(c).__name__ for c in _callbacks(trainer) if isinstance(c, AVERAGING)]
    if averaging and trainer.state.fn == TrainerFn.FITTING:
        raise MisconfigurationException(
            f"Expected no weight averaging under strategy='dni_pipeline', but got {averaging}: they would "
            "average stages that this process does not train. Train under strategy='dni' or 'dni_ddp'."
        )


def refuse_waiting(options: DNIOptions, boundaries: Sequence[str], staleness: int) -> None:
    """Refuse a boundary that waits where stages do not.

    Raises:
        MisconfigurationException: There is one.
    """
    for name in boundaries:
        bp_lambda = float(choose_by_pattern(name, options.bp_lambda, "bp_lambda"))
        factory = choose_by_pattern(name, options.estimator, "estimator")
        made = made_by(factory)
        locks = locks_made_by(factory)
        if staleness and (bp_lambda > 0 or locks):
            waiting = "" if made is None else made.__name__
            what = f"bp_lambda={bp_lambda}" if bp_lambda else f"{waiting}, which is told first,"
            raise MisconfigurationException(
                f"Expected boundaries that wait for nothing with staleness={staleness}, but got {what} at "
                f"boundary {name!r}. Pass staleness=0."
            )


def warn_of_waits(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Warn of what makes the stages wait for each other, and of what only the last stage can do."""
    callbacks = _callbacks(trainer)
    waiting = [type(callback).__name__ for callback in callbacks if waits_in_every_batch(callback)]
    if waiting:
        rank_zero_warn(
            f"{waiting} with `train_time_interval` asks all processes in every batch whether it is time, so "
            "that every stage waits for the slowest one. Pass `every_n_train_steps` instead."
        )
    users = [
        c for c in [*callbacks, module] if not type(c).__module__.startswith(("lightning.", "lightning_dni."))
    ]
    looking = sorted({f"{type(c).__name__}.{h}" for c in users for h in SEES_OUTPUTS if _uses_outputs(c, h)})
    if looking:
        rank_zero_warn(
            f"{looking} use `outputs`, which only the last stage (global rank 0) has: on other ranks they "
            "are a loss of zero in training, and None else. Look at them where `trainer.is_global_zero`."
        )


def _uses_outputs(owner: object, hook: str) -> bool:
    """Whether the code of a hook reads its argument `outputs`, the one before the batch."""
    function: Callable[..., Any] | None = getattr(type(owner), hook, None)
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount < 2:
        return False
    place = 1 if isinstance(owner, pl.LightningModule) else 3
    names: Iterable[str] = code.co_varnames[: code.co_argcount][place : place + 1]
    read = [i.argval for i in dis.get_instructions(code) if i.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))]
    return any(name == got or (isinstance(got, tuple) and name in got) for name in names for got in read)


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    found: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector, untyped)
    return found
