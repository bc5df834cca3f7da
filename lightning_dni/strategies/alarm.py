"""What a stage does about an error: it tells the others before anything else, and waits for nobody then."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dni.pipeline.judge import Limits
from lightning_dni.pipeline.watch import Watch, open_watch
from lightning_dni.strategies._compat import MisconfigurationException, mute_saving, rank_zero_warn
from lightning_dni.strategies.agreement import callbacks_of
from lightning_dni.strategies.placement import Place

T = TypeVar("T")

FAR = 12
"""How much more silence is needed where nobody can see whether a process still runs."""


def limits_of(silence: float) -> Limits:
    """The limits of a watch.

    Args:
        silence: As in `DNIPipelineStrategy`.

    Raises:
        MisconfigurationException: It is no time.
    """
    if not silence > 0:
        raise MisconfigurationException(
            f"Expected `silence` in seconds, above 0, but got {silence!r}. Leave it out for 5 seconds."
        )
    return Limits(silence=silence, far_silence=FAR * silence)


def first_name(rank: int, world_size: int, boundaries: Callable[[], Sequence[str]]) -> str:
    """What the others call process `rank` before `setup`: its stage, if the module is complete by then."""
    with suppress(Exception):  # what is wrong is said once the module has to be complete
        return Place.of(rank, world_size, boundaries()).names[rank]
    return "The process"


class Alarm(Callback):
    """Stands first among the callbacks, so that no other one waits for a stage that is about to stop.

    Args:
        trainer: This process's.
        name: What this process does.
        limits: Of its watch.
        agreed: Whether all stages end by this exception, after the same batch.
        leave: Closes the ways to the other stages.

    Attributes:
        watch: Who knows about the other processes.
        failed: Whether this stage stops because of an error.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        name: str,
        limits: Limits,
        agreed: Callable[[BaseException], bool],
        leave: Callable[[], None],
    ) -> None:
        self.watch: Watch = open_watch(name, limits)
        self.failed = False
        self._trainer, self._agreed, self._leave = trainer, agreed, leave
        self._callbacks = callbacks_of(trainer)
        self._callbacks.insert(0, self)
        self._undo: list[Callable[[], None]] = []

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others."""
        self.ring(exception)

    def note(self, what: str, batch: int | None = None) -> None:
        """Have the others know what this process does, should it stop."""
        at = "" if batch is None else f" batch {batch}"
        self.watch.where = f"{what}{at}, step {self._trainer.global_step}"

    def ring(self, exception: BaseException) -> None:
        """Tell the other stages why this one stops, and part from them."""
        if self.failed or self._agreed(exception):
            return
        self.failed = True
        cause = self.watch.report(exception)
        if cause is not None:  # Lightning raises the exception again, so this is what the user reads
            exception.args = (f"{exception} The reason is that another stage has stopped. {cause}",)
        muted, self._undo = mute_saving(self._callbacks)
        if muted:
            rank_zero_warn(
                f"{muted} cannot save a checkpoint after this error: the stages have stopped in different "
                "batches. Start again from the last checkpoint."
            )
        self._leave()
        self.watch.close()

    def call(self, collective: Callable[[], T]) -> T:
        """What `collective` returns, to which every process has to come.

        Raises:
            StageError: A stage has stopped, this one or another.
        """
        if self.failed:
            self.watch.check()
        return self.watch.call(collective)

    def remove(self) -> None:
        """Take leave of the other processes, and leave the Trainer as it was."""
        self._leave()
        self.watch.close()
        while self._undo:
            self._undo.pop()()
        self._callbacks[:] = [callback for callback in self._callbacks if callback is not self]
