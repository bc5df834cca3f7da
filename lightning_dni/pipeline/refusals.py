"""What a stage in a process of its own cannot be told in time."""

from lightning_dni.core.consumer import asks_for_consumer
from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.settings import StepSettings
from lightning_dni.errors import EstimatorError
from lightning_dni.pipeline.late import refuse_in_late_stage


def refuse_what_is_told(
    cut: Cut,
    kind: type[GradientEstimator] | None,
    staleness: int,
    delays: bool,
    settings: StepSettings,
    copies: bool,
) -> None:
    """Refuse an estimator that waits where stages do not, or cannot be in two of them.

    Args:
        cut: The crossing above the stage.
        kind: Its estimator's class, as far as it was known beforehand.
        staleness: The lag, in updates.
        delays: Whether all stages are known to be given delayed gradients.
        settings: What holds for the step.
        copies: Whether there are other copies of the pipeline.

    Raises:
        EstimatorError: It does.
    """
    estimator = cut.installed.estimator
    if asks_for_consumer(cut):
        _refuse_twins(cut, kind)
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


def _refuse_twins(cut: Cut, kind: type[GradientEstimator] | None) -> None:
    """Refuse an estimator that is needed in the stage above as well, and would be another one there."""
    if kind is None:
        raise EstimatorError(
            "Expected to know beforehand which layers of another stage to swap in a pipeline, but got "
            f"{cut.who} from a function. Pass the class or a partial of it."
        )
    if cut.installed.parameters:
        raise EstimatorError(
            f"Expected nothing to be trained in {cut.who}, which the stage above has as well and does not "
            f"train, but got {len(cut.installed.parameters)} parameters. Train in one process: "
            "strategy='dni' or 'dni_ddp'."
        )
