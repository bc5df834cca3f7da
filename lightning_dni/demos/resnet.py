"""The residual network for 32x32 images (He et al. 2016, section 4.2), in blocks worth cutting."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dni.demos.arguments import check_count
from lightning_dni.demos.models import Classifier


def _conv(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that batch norm follows, and so without a bias."""
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + two 3x3 convolutions of x); a 1x1 convolution where the shape changes.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: what height and width are divided by.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(in_channels, channels, 3, stride), nn.ReLU(), _conv(channels, channels, 3)
        )
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else _conv(in_channels, channels, 1, stride)

    @override
    def forward(
        self, inputs: Float[Tensor, " batch in_channels height width"]
    ) -> Float[Tensor, " batch channels new_height new_width"]:
        """Features `[batch, channels, height / stride, width / stride]`, rounded up."""
        return F.relu(self.shortcut(inputs) + self.residual(inputs))


class ResNet(nn.Module):
    """6n+2 layers of width 16, 32 and 64: `stem`, `block_0`, ..., `block_{3n-1}`, `head`.

    Args:
        n: blocks of each width.
        in_channels: channels of the images.
        num_classes: number of classes.
        width: channels of the first third, doubled in the second and again in the last.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [name for name, _ in ResNet(n=1).named_children()]
        ['stem', 'block_0', 'block_1', 'block_2', 'head']
    """

    def __init__(self, n: int = 3, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> None:
        check_count("n", n)
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes, minimum=2)
        check_count("width", width)
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, width, 3), nn.ReLU())
        widths = [width] + n * [width] + n * [2 * width] + n * [4 * width]
        for i, (before, after) in enumerate(pairwise(widths)):
            self.add_module(f"block_{i}", ResidualBlock(before, after, after // before))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))

    @override
    def forward(
        self, inputs: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, " batch classes"]:
        """Class scores `[batch, classes]`."""
        for block in self.children():
            inputs = block(inputs)
        return inputs


class ResNetClassifier(Classifier):
    """A `ResNet` on cross-entropy: `net.stem`, `net.block_0`, ..., `net.head`.

    Args:
        n: blocks of each width; 6n+2 layers.
        in_channels: channels of the images.
        num_classes: number of classes.
        width: channels of the first third.
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: of that optimizer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        n: int = 3,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 16,
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(ResNet(n, in_channels, num_classes, width), num_classes, optimizer, learning_rate)
        self.save_hyperparameters()

    @override
    def forward(
        self, inputs: Float[Tensor, " batch channels height width"]
    ) -> Float[Tensor, " batch classes"]:
        """Class scores `[batch, classes]`."""
        logits: Tensor = self.net(inputs)
        return logits
