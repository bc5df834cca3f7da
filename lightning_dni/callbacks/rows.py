"""Which steps a monitor measures, and whether Lightning writes them down."""

import lightning.pytorch as pl

from lightning_dni.callbacks._compat import rank_zero_warn, row_interval


def check_interval(every_n_train_steps: int) -> int:
    """The number of steps from one measurement to the next.

    Raises:
        ValueError: It is not a positive integer.
    """
    every_n = every_n_train_steps
    if isinstance(every_n, bool) or not isinstance(every_n, int) or every_n < 1:
        raise ValueError(
            f"Expected `every_n_train_steps` to be an integer of at least 1, but got {every_n!r}. Leave "
            "the callback out to measure nothing."
        )
    return every_n


def warn_of_dropped_rows(trainer: pl.Trainer, monitor: pl.Callback, every_n: int) -> None:
    """Say so where `monitor` measures steps, every n-th, of which no logger will hear."""
    every = row_interval(trainer)
    if not trainer.loggers or (every and every_n % every == 0):
        return
    rank_zero_warn(
        f"{type(monitor).__name__}(every_n_train_steps={every_n}) measures steps at which "
        f"Trainer(log_every_n_steps={every}) writes no row: those measurements reach no logger. Pass "
        f"`Trainer(log_every_n_steps={every_n})`, or a number that divides {every_n}."
    )
