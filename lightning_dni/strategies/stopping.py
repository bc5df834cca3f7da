"""All stages end a fit after the same batch, whoever asks for it, and none waits to find out."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer

from lightning_dni.pipeline.signals import Ask, Signals
from lightning_dni.strategies._compat import (
    SIGTERMException,
    follow_batches,
    free_timer,
    mark_sigterm,
    note_sigterm,
)

Collect = Callable[[torch.Tensor], torch.Tensor]
"""Gives the largest of what all processes have, for each element; all of them call it."""


class CommonStop:
    """Takes `trainer.should_stop`, a time limit and a SIGTERM for requests, granted on all ranks alike.

    In an epoch a request is granted after the first batch that begins on stage 0 when it has heard of it.
    After a validation and after an epoch all stages come together anyway, and it is granted at once.

    Args:
        trainer: This process's.
        signals: What carries requests and grants.
        collect: How all stages agree where they come together.
        batch_end: What to do after every batch beside this.
    """

    def __init__(
        self, trainer: pl.Trainer, signals: Signals, collect: Collect, batch_end: Callable[[], None]
    ) -> None:
        self._trainer, self._signals, self._collect = trainer, signals, collect
        self._batch_end = batch_end
        self._evaluated = False
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Begin to listen."""
        trainer = self._trainer
        self._undo += note_sigterm(trainer, lambda: self._signals.ask(Ask.LEAVE))
        self._undo += follow_batches(trainer, self._after_batch, self._after_validation, self.settle)
        callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009
        for timer in (callback for callback in callbacks if isinstance(callback, Timer)):
            self._undo += free_timer(timer, self._expire)

    def remove(self) -> None:
        """Leave the Trainer as it was."""
        while self._undo:
            self._undo.pop()()

    @property
    def leaves(self) -> bool:
        """Whether it is agreed that the processes end."""
        return bool(self._signals.decided & Ask.LEAVE)

    def after_evaluation_batch(self) -> None:
        """Have the evaluation loop end where it is agreed that the processes end."""
        if self.leaves:
            mark_sigterm(self._trainer)

    def after_evaluation(self) -> None:
        """All stages have come together after a validation; what the hooks ask for is looked at then."""
        self._evaluated = True

    def _expire(self) -> None:
        self._trainer.should_stop = True

    def _after_batch(self) -> None:
        self._batch_end()
        if self._trainer.should_stop:
            self._signals.ask(Ask.STOP)
        self._grant()

    def _after_validation(self) -> None:
        if self._evaluated:
            self.settle()

    def settle(self) -> None:
        """All stages come here: grant what any of them has asked for."""
        self._evaluated = False
        asked = self._signals.asked | (Ask.STOP if self._trainer.should_stop else Ask.NOTHING)
        told = self._collect(torch.tensor([int(bool(asked & what)) for what in (Ask.STOP, Ask.LEAVE)]))
        stop, leave = (bool(t) for t in told.tolist())
        self._signals.settle((Ask.STOP if stop else Ask.NOTHING) | (Ask.LEAVE if leave else Ask.NOTHING))
        self._grant()
        if leave:
            raise SIGTERMException

    def _grant(self) -> None:
        self._trainer.should_stop = bool(self._signals.decided & Ask.STOP)
        if self.leaves:
            mark_sigterm(self._trainer)
