"""Every Lightning name that callbacks need and users are not told of, each with a canary in the tests."""

from collections.abc import Collection
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

__all__ = ["MisconfigurationException", "forget_logged", "rank_zero_info", "rank_zero_warn", "row_interval"]


def row_interval(trainer: pl.Trainer) -> int:
    """Number of optimizer steps from one row of `log_dict` values to the next; 0 where none is written."""
    undeclared = cast(Any, trainer)
    return 1 if undeclared.fast_dev_run else int(undeclared.log_every_n_steps)


def forget_logged(trainer: pl.Trainer, names: Collection[str]) -> None:
    """Keep the values that `log_dict` was given for `names` out of every row still to come.

    Lightning writes the last value of a step again with every later row of the epoch, so that a probe
    would be repeated at steps at which nothing was measured.
    """
    results = trainer._results
    for result in () if results is None else results.result_metrics:
        if result.meta.name in names:
            result.has_reset = True  # `reset()` would move its zeros to the device and wait for it
