"""Garbage of start-up is collected on all stages after the same step."""

import gc
import weakref

import lightning.pytorch as pl
import pytest
from strategies.staged_fits import fit_staged, on_stages, staged


class Node:
    """An object that refers to itself: only a search of all objects finds out that it is gone."""

    def __init__(self):
        self.me = self


class Garbage(pl.Callback):
    """Makes garbage in every batch, and notes whether it is still there after it."""

    def __init__(self):
        self.left = []

    def on_train_batch_start(self, *_):
        self.ref = weakref.ref(Node())

    def on_train_batch_end(self, *_):
        self.left.append(self.ref() is not None)


def kept(rank, options):
    """Whether garbage is left after each batch, where Python itself never looks."""
    gc.disable()
    garbage = Garbage()
    fit_staged(strategy=staged(**options), callbacks=[garbage], max_epochs=1, limit_train_batches=3)
    return garbage.left


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "1f1b", "microbatches": 2, "estimator": None}], ids=["dni", "1f1b"]
)
def test_all_stages_collect_once_after_the_first_step(options):
    assert on_stages(kept, options) == [[False, True, True]] * 2
