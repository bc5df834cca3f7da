"""Small classifiers whose blocks have names worth writing in a recipe."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_dni.demos.arguments import check_choice, check_count, check_not_negative, check_positive

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def _half_squared_distances(logits: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of scores and one-hot labels, averaged over rows."""
    one_hot = F.one_hot(targets, logits.shape[1])
    return (logits - one_hot).square().sum(1).mean() / 2


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squared_error": _half_squared_distances,
}


class Classifier(pl.LightningModule):
    """Train `net` on a loss of its scores and log how well it does; `forward` is the subclass's."""

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        optimizer: str,
        learning_rate: float,
        weight_decay: float = 0.0,
        loss: str = "cross_entropy",
    ) -> None:
        check_choice("optimizer", optimizer, OPTIMIZERS)
        check_choice("loss", loss, LOSSES)
        check_positive("learning_rate", learning_rate)
        check_not_negative("weight_decay", weight_decay)
        super().__init__()
        self.net = net
        self._optimizer, self._loss = optimizer, LOSSES[loss]
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_error = MeanMetric()
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_error = MeanMetric()

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """The loss, logged as `train_loss`."""
        inputs, targets = batch
        loss = self._loss(self(inputs), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log loss, accuracy and error over the validation rows."""
        inputs, targets = batch
        logits = self(inputs)
        loss = self._loss(logits, targets)
        self.val_accuracy.update(logits, targets)
        self.val_error.update(_percent_wrong(logits, targets))
        self.log("val_loss", loss, batch_size=len(targets), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
        self.log("val_error", self.val_error)

    @override
    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log accuracy and error over the test rows."""
        inputs, targets = batch
        logits = self(inputs)
        self.test_accuracy.update(logits, targets)
        self.test_error.update(_percent_wrong(logits, targets))
        self.log("test_accuracy", self.test_accuracy)
        self.log("test_error", self.test_error)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was asked for."""
        options = {"lr": self._learning_rate, "weight_decay": self._weight_decay}
        return OPTIMIZERS[self._optimizer](self.parameters(), **options)


class MLPClassifier(Classifier):
    """A multilayer perceptron: `net.hidden_0`, `net.hidden_1`, ..., `net.output`.

    Each hidden block is linear, batch normalisation, activation. Inputs of any shape are flattened. To cut
    it everywhere, name `net.hidden_*`; to cut it once in the middle, at any depth, let it mark the middle
    and name `net.middle`.

    Args:
        input_size: numbers in one input, all dimensions multiplied.
        hidden_size: width of every hidden block.
        num_hidden: number of hidden blocks; 0 leaves a linear classifier.
        num_classes: number of classes.
        batch_norm: whether hidden blocks normalise over the batch.
        activation: a key of `ACTIVATIONS`.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: of that optimizer.
        weight_decay: factor of the squared norm of all parameters, halved, that is added to the loss.
        mark_middle: whether `net.middle`, which hands on what it gets, follows the lower half of the
            blocks (the smaller one, where their number is odd).
        loss: a key of `LOSSES`; the squared error is half the distance to one-hot labels.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [name for name, _ in MLPClassifier(num_hidden=2).net.named_children()]
        ['hidden_0', 'hidden_1', 'output']
        >>> [name for name, _ in MLPClassifier(num_hidden=2, mark_middle=True).net.named_children()]
        ['hidden_0', 'middle', 'hidden_1', 'output']
    """

    def __init__(
        self,
        input_size: int = 64,
        hidden_size: int = 256,
        num_hidden: int = 3,
        num_classes: int = 10,
        batch_norm: bool = True,
        activation: str = "relu",
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        mark_middle: bool = False,
        loss: str = "cross_entropy",
    ) -> None:
        check_count("input_size", input_size)
        check_count("hidden_size", hidden_size)
        check_count("num_hidden", num_hidden, minimum=2 if mark_middle else 0)
        check_count("num_classes", num_classes, minimum=2)
        check_choice("activation", activation, ACTIVATIONS)
        sizes = [input_size] + num_hidden * [hidden_size]
        net = nn.Sequential(OrderedDict[str, nn.Module]())
        for i in range(num_hidden):
            norm = [nn.BatchNorm1d(hidden_size)] if batch_norm else []
            linear = nn.Linear(sizes[i], sizes[i + 1])
            net.add_module(f"hidden_{i}", nn.Sequential(linear, *norm, ACTIVATIONS[activation]()))
            if mark_middle and i + 1 == num_hidden // 2:
                net.add_module("middle", nn.Identity())
        net.add_module("output", nn.Linear(sizes[-1], num_classes))
        super().__init__(net, num_classes, optimizer, learning_rate, weight_decay, loss)
        self.save_hyperparameters()

    @override
    def forward(self, inputs: Float[Tensor, " batch *dims"]) -> Float[Tensor, " batch classes"]:
        """Class scores `[batch, classes]`."""
        logits: Tensor = self.net(inputs.flatten(1))
        return logits


class ConvClassifier(Classifier):
    """A convolutional network: `net.block_0`, `net.block_1`, ..., `net.head`.

    Each block is a 3x3 convolution, batch normalisation, activation; every block but the first
    halves height and width. The head averages over positions, or over parts of the image, so images may have
    any size.

    Args:
        in_channels: channels of the images.
        channels: output channels of each block, one entry per block.
        num_classes: number of classes.
        batch_norm: whether blocks normalise over the batch.
        activation: a key of `ACTIVATIONS`.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: of that optimizer.
        pooled_size: height and width of what the head sees; each of its positions is an average.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> ConvClassifier(channels=(8, 16))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        num_classes: int = 10,
        batch_norm: bool = True,
        activation: str = "relu",
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        pooled_size: int = 1,
    ) -> None:
        check_count("in_channels", in_channels)
        check_count("len(channels)", len(channels))
        for i, count in enumerate(channels):
            check_count(f"channels[{i}]", count)
        check_count("num_classes", num_classes, minimum=2)
        check_count("pooled_size", pooled_size)
        check_choice("activation", activation, ACTIVATIONS)
        sizes = [in_channels, *channels]
        net = nn.Sequential(OrderedDict[str, nn.Module]())
        for i, size in enumerate(channels):
            norm = [nn.BatchNorm2d(size)] if batch_norm else []
            conv = nn.Conv2d(sizes[i], size, 3, stride=1 if i == 0 else 2, padding=1)
            net.add_module(f"block_{i}", nn.Sequential(conv, *norm, ACTIVATIONS[activation]()))
        pool, width = nn.AdaptiveAvgPool2d(pooled_size), sizes[-1] * pooled_size**2
        net.add_module("head", nn.Sequential(pool, nn.Flatten(), nn.Linear(width, num_classes)))
        super().__init__(net, num_classes, optimizer, learning_rate)
        self.save_hyperparameters()

    @override
    def forward(
        self, inputs: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, " batch classes"]:
        """Class scores `[batch, classes]`."""
        logits: Tensor = self.net(inputs)
        return logits


def _percent_wrong(logits: Float[Tensor, " batch classes"], targets: Tensor) -> Float[Tensor, " batch"]:
    return 100.0 * (logits.argmax(1) != targets).float()
