"""Whether the loss came back through every boundary."""

from collections.abc import Callable, Collection, Iterable, Sequence

from torch import Tensor

from lightning_dni.core.cut import Cut, lineage
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.stage import Stage
from lightning_dni.errors import BoundaryError


def refuse_absent(
    settings: StepSettings, fired: Collection[str], cuts: Sequence[Cut], last: Stage[Cut]
) -> None:
    """Refuse a loss that came past a boundary.

    Args:
        settings: What holds for the step.
        fired: Names of the boundaries that ran in it.
        cuts: The cuts of the step.
        last: What lies between the loss and the topmost cuts.

    Raises:
        BoundaryError: It did.
    """
    absent = [name for name in settings.bp_lambda if name not in fired]
    if settings.own_parameters is not None:
        absent = _reached_uncut(absent, settings.own_parameters, last)
    absent += _bypassed(cuts, last)
    if absent:
        raise BoundaryError(
            f"Expected every boundary to run in the forward pass that reached the loss, but "
            f"{absent} did not (ran: {sorted(fired)}). Call the module itself, not its "
            "`forward`, with gradients enabled; or leave it out of `boundaries`. Where torch.compile had "
            "compiled what contains it before the engine was attached, compile submodules of the model "
            "instead, or call torch.compiler.reset() once the engine is attached."
        )


def _reached_uncut(
    absent: Sequence[str], own_parameters: Callable[[str], Iterable[Tensor]], last: Stage[Cut]
) -> list[str]:
    """Those of the boundaries `absent` whose own parameters the loss came to all the same."""
    stages = (last, *(c.stage for c in lineage(last.parents))) if absent else ()
    variables = {id(v) for stage in stages for v in stage.variables}
    return [name for name in absent if any(id(p) in variables for p in own_parameters(name))]


def _bypassed(cuts: Sequence[Cut], last: Stage[Cut]) -> list[str]:
    """Boundaries that only ran in a forward pass for nothing, while the loss came past them.

    It did where it came through a boundary that lies below them, or to the variables of their stage.
    """
    counted = lineage(last.parents)
    reached = {crossing.boundary for crossing in counted}
    dropped = {c.boundary: c for c in cuts if c.boundary not in reached}
    if not dropped:
        return []
    variables = {id(v) for stage in (last, *(c.stage for c in counted)) for v in stage.variables}
    return [
        name
        for name, crossing in dropped.items()
        if any(parent.boundary in reached for parent in crossing.stage.parents)
        or any(id(v) in variables for v in crossing.stage.variables)
    ]
