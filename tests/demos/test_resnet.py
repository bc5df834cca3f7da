"""The residual network has the shapes and the parameters of the paper's section 4.2."""

import pytest
import torch
from fits import quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni.demos import ResNet, ResNetClassifier
from lightning_dni.demos.resnet import ResidualBlock

STEM = 9 * 3 * 16 + 2 * 16
FIRST = 2 * 9 * 16 * 16 + 4 * 16
SECOND = 2 * 9 * 32 * 32 + 4 * 32
THIRD = 2 * 9 * 64 * 64 + 4 * 64
TO_SECOND = 9 * 16 * 32 + 9 * 32 * 32 + 4 * 32 + 16 * 32 + 2 * 32
TO_THIRD = 9 * 32 * 64 + 9 * 64 * 64 + 4 * 64 + 32 * 64 + 2 * 64
HEAD = 64 * 10 + 10


@pytest.mark.parametrize(("n", "total"), [(1, 78_042), (3, 272_474)])
def test_parameters_are_those_counted_by_hand(n, total):
    by_hand = STEM + n * FIRST + TO_SECOND + (n - 1) * SECOND + TO_THIRD + (n - 1) * THIRD + HEAD
    assert sum(p.numel() for p in ResNet(n).parameters()) == by_hand == total


@pytest.mark.parametrize("n", [1, 3])
def test_it_has_6n_plus_2_layers(n):
    layers = [m for m in ResNet(n).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len([m for m in layers if getattr(m, "kernel_size", None) != (1, 1)]) == 6 * n + 2
    assert len([m for m in layers if getattr(m, "kernel_size", None) == (1, 1)]) == 2


def test_blocks_are_named_and_shrink_the_map():
    net, shapes, h = ResNet(1), {}, torch.zeros(2, 3, 32, 32)
    for name, block in net.named_children():
        h = block(h)
        shapes[name] = tuple(h.shape)
    assert shapes == {
        "stem": (2, 16, 32, 32),
        "block_0": (2, 16, 32, 32),
        "block_1": (2, 32, 16, 16),
        "block_2": (2, 64, 8, 8),
        "head": (2, 10),
    }


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2), (8, 1)])
def test_a_block_adds_its_shortcut(channels, stride):
    block, x = ResidualBlock(4, channels, stride).eval(), torch.randn(2, 4, 7, 7)
    (first, norm), _, (second, norm_2) = block.residual
    residual = norm_2(second(F.relu(norm(first(x)))))
    shortcut = x
    if (channels, stride) != (4, 1):
        conv = block.shortcut[0]
        shortcut = F.conv2d(x, conv.weight, stride=stride) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), F.relu(shortcut + residual))


@pytest.mark.parametrize("name", ["n", "in_channels", "num_classes", "width"])
def test_arguments_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        ResNetClassifier(**{name: 0})


def test_the_classifier_learns():
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = ResNetClassifier(n=1, width=4, num_classes=2, learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=15)
    trainer.fit(model, DataLoader(TensorDataset(x, torch.arange(8) % 2), 8))
    assert trainer.callback_metrics["train_loss"] < 0.2
    assert model.hparams["n"] == 1
