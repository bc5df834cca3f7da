"""What an activation checkpoint runs again for a backward pass has to come out as it did."""

from collections.abc import Sequence

import torch

from lightning_dni.core.cut import Cut
from lightning_dni.core.immediate import ImmediateUpdates
from lightning_dni.errors import StageError


def refuse_rerun(boundary: str, cuts: Sequence[Cut], updates: ImmediateUpdates | None, reseeds: bool) -> None:
    """Refuse a checkpoint in which a stage goes on from another value, or draws other numbers, a second time.

    It holds more than one stage then: in a backward pass of one above, `boundary` runs again and is not cut.

    Args:
        boundary: The boundary that runs, perhaps only to be looked at.
        cuts: The crossings of this forward pass.
        updates: The immediate updates of this step.
        reseeds: Whether every stage has a stream of its own.

    Raises:
        StageError: There is such a checkpoint.
    """
    if torch._C._current_graph_task_id() == -1:
        return  # no backward pass
    crossings = [cut for cut in cuts if cut.boundary == boundary]
    if not crossings or any(cut.closed and cut.outputs for cut in crossings):
        return  # nobody goes on from it: it is run for the stage below it, or to the end, as torch allows
    option = None
    if updates is not None and any(updates.has_updated(cut.stage.variables) for cut in crossings):
        option = "update='immediate'"
    elif any(cut.predicted for cut in crossings):
        option = "synthetic inputs"
    elif reseeds:
        option = "rng='stage'"
    if option is not None:
        raise StageError(
            f"Expected no more than one stage in an activation checkpoint with {option}, but boundary "
            f"{boundary!r} lies inside one: what is above it there would be run again otherwise than before. "
            "Checkpoint each boundary's module by itself, or leave that option out."
        )
