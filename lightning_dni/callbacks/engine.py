"""Find the engine behind a trainer's strategy, whatever strategy it is."""

import lightning.pytorch as pl

from lightning_dni.callbacks._compat import MisconfigurationException
from lightning_dni.core.report import HasEngine, Observable


def engine_of(trainer: pl.Trainer, callback: pl.Callback, exact: bool = False) -> Observable:
    """The engine that `callback` is to work with.

    Args:
        trainer: Whose strategy is asked.
        callback: Who asks.
        exact: Whether one without synthetic gradients will do.

    Raises:
        MisconfigurationException: The strategy has none, or one without synthetic gradients, or one with
            truncations alone, or the Trainer is another package's.
    """
    if not isinstance(trainer, pl.Trainer):
        raise MisconfigurationException(
            f"Expected a Trainer of lightning.pytorch for {type(callback).__name__}, but got one of "
            f"{type(trainer).__module__.partition('.')[0]}, whose classes are others. Replace "
            "`import pytorch_lightning as pl` by `import lightning.pytorch as pl`, everywhere."
        )
    strategy, who = trainer.strategy, type(callback).__name__
    if isinstance(strategy, HasEngine) and isinstance(strategy.engine, Observable):
        if exact or strategy.engine.bp_lambda:
            return strategy.engine
        truncations = strategy.engine.describe().get("truncations")
        if truncations:
            raise MisconfigurationException(
                f"Expected boundaries for {who}, but got truncations alone, {truncations}, at which there is "
                "no true gradient and no lambda: the future is not there. GradientMonitor compares with what "
                f"comes back; take {who} out of `callbacks`."
            )
        raise MisconfigurationException(
            f"Expected synthetic gradients for {who}, but got {type(strategy).__name__} with an exact "
            f"schedule, which has none. Pass schedule='dni', or take {who} out of `callbacks`."
        )
    raise MisconfigurationException(
        f"Expected a strategy with synthetic gradients for {who}, but got {type(strategy).__name__}, which "
        "exposes no `engine`. Pass Trainer(strategy=DNIStrategy(boundaries=[...], estimator=...)), or take "
        f"{who} out of `callbacks` for plain training."
    )


def key_of(metric: str, boundary: str) -> str:
    """The key of `metric` at `boundary` in loggers, one section per metric.

    >>> key_of("dni_sg_error", "net.3")
    'dni_sg_error/net_3'
    """
    return f"{metric}/{boundary.replace('.', '_')}"
