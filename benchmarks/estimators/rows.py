"""What is compared: the nets, and what takes the place of backprop in them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from fashion import FashionDataModule
from torch import Tensor

from lightning_dni.core import EstimatorFactory, GradientEstimator
from lightning_dni.demos import (
    ConvClassifier,
    GPTLanguageModel,
    MLPClassifier,
    MNISTDataModule,
    TextDataModule,
    count_tokens,
)
from lightning_dni.estimators import (
    ControlVariateEstimator,
    ConvEstimator,
    CriticCascade,
    CriticEstimator,
    DelayedGradientEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
    LocalLossEstimator,
    LowRankEstimator,
    SobolevEstimator,
    ZeroEstimator,
)

CHARACTERS = 97
ESTIMATOR_STEPS = {"critic, label share, 4 steps": 4}
"""Rows whose estimators take several steps per step of the net."""


class NextCharacter(GPTLanguageModel):
    """A GPT that also logs how often its best guess at the next character is wrong, in percent."""

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log `val_error`."""
        self._log_error("val_error", batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log `test_error`."""
        self._log_error("test_error", batch)

    def _log_error(self, name: str, batch: Sequence[Tensor]) -> None:
        tokens, following = batch
        self.log(name, 100.0 * (self(tokens).argmax(-1) != following).float().mean(), batch_size=len(tokens))


class Net(NamedTuple):
    """A net and its data.

    Attributes:
        data: Makes the data module from a folder.
        model: Makes the net from depth and learning rate.
        boundaries: Where it is cut: after every hidden layer or block.
        classes: Number of classes.
        regressor: Predicts gradients of its activations.
        undefined: Rows that make no sense here.
        denominator: What its loss is divided by.
        rates: The grid's learning rates of the net.
    """

    data: Callable[[Path], pl.LightningDataModule]
    model: Callable[[int, float], pl.LightningModule]
    boundaries: list[str]
    classes: int = 10
    regressor: Callable[..., GradientEstimator] = LinearEstimator
    undefined: frozenset[str] = frozenset()
    denominator: Any = "batch"
    rates: tuple[float, ...] = (1e-3, 3e-3)


_SPLIT: dict[str, Any] = {"batch_size": 128, "val_size": 10_000}
_mnist, _fashion = partial(MNISTDataModule, **_SPLIT), partial(FashionDataModule, **_SPLIT)


def _perceptron(depth: int, rate: float, width: int = 128) -> MLPClassifier:
    return MLPClassifier(input_size=784, hidden_size=width, num_hidden=depth, learning_rate=rate)


def _convolutional(depth: int, rate: float) -> ConvClassifier:
    channels = [16 * 2 ** min(k, 2) for k in range(depth)]
    return ConvClassifier(channels=channels, pooled_size=4, learning_rate=rate)


def _transformer(depth: int, rate: float) -> NextCharacter:
    return NextCharacter(vocabulary=CHARACTERS, width=64, layers=depth, dropout=0.0, learning_rate=rate)


NETS: Mapping[str, Net] = {
    "mnist-mlp": Net(_mnist, _perceptron, ["net.hidden_*"]),
    "mnist-mlp-512": Net(_mnist, partial(_perceptron, width=512), ["net.hidden_*"]),
    "mnist-mlp-1024": Net(
        _mnist, partial(_perceptron, width=1024), ["net.hidden_*"], rates=(3e-4, 1e-3, 3e-3)
    ),
    "fashion-mlp": Net(_fashion, _perceptron, ["net.hidden_*"]),
    "fashion-cnn": Net(
        _fashion,
        _convolutional,
        ["net.block_*"],
        regressor=partial(ConvEstimator, hidden_channels=(), kernel_size=3),
        undefined=frozenset({"low-rank"}),
    ),
    "text-transformer": Net(
        lambda folder: TextDataModule(batch_size=32),
        _transformer,
        ["net.embedding", "net.block_*"],
        classes=CHARACTERS,
        # similarity wants one label for each row, and FA every layer's input at a boundary
        undefined=frozenset({"local loss, similarity", "FA"}),
        denominator=count_tokens,
    ),
}


def rows_of(net: Net) -> dict[str, EstimatorFactory | None]:
    """What gives the gradients, by name; None is backprop."""
    sees = {"num_classes": net.classes}
    rows: dict[str, EstimatorFactory | None] = {
        "backprop": None,
        "zero": ZeroEstimator,
        "DNI": net.regressor,
        "cDNI": partial(net.regressor, **sees),
        "low-rank": partial(LowRankEstimator, **sees),
        "critic": partial(CriticEstimator, **sees),
        "critic, label share": partial(CriticEstimator, **sees, label_share=0.5),
        "critic, label share, 4 steps": partial(CriticEstimator, **sees, label_share=0.5),
        "Sobolev": partial(SobolevEstimator, **sees),
        "Sobolev, label share": partial(SobolevEstimator, **sees, derivative_weight=100.0, label_share=0.2),
        "cascade": partial(CriticCascade, **sees),
        "local loss": partial(LocalLossEstimator, **sees),
        "local loss, similarity": partial(LocalLossEstimator, **sees, similarity=0.99),
        "FA": FeedbackAlignmentEstimator,
        "DFA": DirectFeedbackAlignmentEstimator,
        "Kickback": partial(KickbackEstimator, **sees),
        "delayed gradient": DelayedGradientEstimator,
        "control variate": partial(ControlVariateEstimator, predictor=partial(net.regressor, **sees)),
    }
    return {name: factory for name, factory in rows.items() if name not in net.undefined}


def kind_of(factory: EstimatorFactory) -> tuple[type[GradientEstimator], dict[str, Any]]:
    """The class that a factory makes, and its options."""
    options: dict[str, Any] = {}
    while isinstance(factory, partial):
        factory, options = factory.func, {**factory.keywords, **options}
    assert isinstance(factory, type)
    return factory, options


def is_learned(factory: EstimatorFactory | None) -> bool:
    """Whether an estimator has a learning rate."""
    return factory is not None and kind_of(factory)[0].loss is not GradientEstimator.loss
