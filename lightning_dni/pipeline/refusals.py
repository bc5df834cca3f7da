"""What a stage in a process of its own cannot be told in time."""

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import ONE_PROCESS
from lightning_dni.errors import EstimatorError


def refuse_what_is_told(cut: Cut, staleness: int) -> None:
    """Refuse an estimator that asks for what another process has, or waits where stages do not.

    Args:
        cut: The crossing above the stage.
        staleness: The lag, in updates.

    Raises:
        EstimatorError: It does.
    """
    estimator = cut.installed.estimator
    alone = sorted(s.value for s in estimator.needs & ONE_PROCESS)
    if alone:
        raise EstimatorError(
            "Expected estimators that stages in processes of their own can tell all they ask for, but "
            f"got {cut.who}, which needs {alone}. Train in one process: strategy='dni' or 'dni_ddp'."
        )
    if cut.waits and staleness and not estimator.delay:
        what = f"{cut.who}, which is told first," if estimator.locks else f"bp_lambda={cut.bp_lambda}"
        raise EstimatorError(
            f"Expected a stage that does not wait, with staleness={staleness}, but got {what} at "
            f"boundary {cut.boundary!r}. Pass staleness=0, or schedule='1f1b' for exact gradients."
        )
