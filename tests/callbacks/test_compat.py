"""Canaries: what Lightning's undocumented names must still do for the callbacks, in one place."""

import lightning.pytorch as pl
from callbacks.runs import csv_rows, rows_with
from fits import fit, net, quiet_trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_dni.callbacks._compat import forget_logged, row_interval


class Once(pl.Callback):
    """Logs at step 1 only, and takes it back or not."""

    def __init__(self, forget):
        self.forget = forget

    def on_train_batch_start(self, trainer, *args):
        if self.forget and trainer.global_step == 2:
            forget_logged(trainer, ["once"])

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 2:
            module.log("once", 1.0)


def test_lightning_repeats_step_values_until_they_are_forgotten():
    steps = {}
    for forget in (False, True):
        logger = CSVLogger(".", name=str(forget))
        fit(net(), callbacks=[Once(forget)], logger=logger, log_every_n_steps=1, max_steps=4)
        steps[forget] = rows_with(csv_rows(logger), "once")
    assert steps[False] == [1, 2, 3], "Lightning no longer repeats: `forget_logged` may go"
    assert steps[True] == [1], "`trainer._results` no longer obeys `has_reset`"


def test_forgetting_outside_a_loop_does_nothing():
    forget_logged(quiet_trainer(), ["once"])


def test_row_interval_is_the_trainers():
    assert row_interval(quiet_trainer(log_every_n_steps=7)) == 7
    assert row_interval(quiet_trainer(log_every_n_steps=0)) == 0
    assert row_interval(quiet_trainer(fast_dev_run=2)) == 1
