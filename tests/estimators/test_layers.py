"""Stack against the same layers called one by one."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.layers import Stack, check_sizes, start_at_zero
from lightning_dni.estimators.normalization import BatchNorm


@pytest.mark.parametrize("norm", [None, partial(BatchNorm, feature_dim=-1)], ids=["plain", "batch norm"])
@pytest.mark.parametrize("sizes", [(5, 2), (5, 4, 2), (5, 4, 3, 2)], ids=str)
def test_is_its_layers_one_by_one(sizes, norm):
    stack = Stack(nn.Linear, sizes, norm)
    nn.init.normal_(stack.layers[-1].weight)
    x, added = torch.randn(6, 5), torch.randn(6, sizes[1])
    expected = stack.layers[0](x) + added
    for k, layer in enumerate(stack.layers[1:]):
        expected = layer(F.relu(stack.norms[k](expected) if norm else expected))
    assert_close(stack(x, added), expected)
    assert_close(stack(x, torch.zeros_like(added)), stack(x))


def test_only_the_last_layer_starts_at_zero():
    stack = Stack(nn.Linear, (5, 4, 2))
    assert [bool(p.any()) for p in stack.parameters()] == [True, True, False, False]


def test_start_at_zero():
    layer = nn.Conv1d(2, 3, 3)
    start_at_zero(layer)
    assert not any(p.any() for p in layer.parameters())


def test_check_sizes():
    check_sizes("sizes", ())
    check_sizes("sizes", (2, 3), at_least=2)
    with pytest.raises(EstimatorError, match=r"`sizes` to be at least 2, but got \[2, 1\]"):
        check_sizes("sizes", (2, 1), at_least=2)
