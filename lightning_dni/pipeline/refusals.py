"""What a stage in a process of its own cannot be told in time."""

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import ONE_PROCESS
from lightning_dni.core.settings import StepSettings
from lightning_dni.errors import EstimatorError
from lightning_dni.pipeline.late import refuse_in_late_stage


def refuse_what_is_told(cut: Cut, staleness: int, delays: bool, settings: StepSettings, copies: bool) -> None:
    """Refuse an estimator that asks for what another process has, or waits where stages do not.

    Args:
        cut: The crossing above the stage.
        staleness: The lag, in updates.
        delays: Whether all stages are known to be given delayed gradients.
        settings: What holds for the step.
        copies: Whether there are other copies of the pipeline.

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
    if estimator.delay:
        beside = {
            "accumulated batches": settings.accumulate > 1,
            "several copies": copies,
            "a probe": settings.probe,
        }
        refuse_in_late_stage(cut.who, delays, beside)
    elif cut.waits and staleness:
        what = f"{cut.who}, which is told first," if estimator.locks else f"bp_lambda={cut.bp_lambda}"
        raise EstimatorError(
            f"Expected a stage that does not wait, with staleness={staleness}, but got {what} at "
            f"boundary {cut.boundary!r}. Pass staleness=0, or schedule='1f1b' for exact gradients."
        )
