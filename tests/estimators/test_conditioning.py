"""Conditioning against the product with one-hot labels, and its leaves side by side."""

import pytest
import torch
from making import Making
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import Conditioning, check_aligned, join, joint_width, split

SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))


def test_labels_are_the_product_with_one_hot():
    conditioning = Conditioning(SPEC, 4, num_classes=3, context_size=None, zero=False)
    y = torch.tensor([2, 0, 0, 1])
    added = conditioning(y, torch.randn(4, 5))
    one_hot = F.one_hot(y, 3).float()
    assert_close(added, one_hot @ conditioning.weight)
    upstream = torch.randn(4, 4)
    added.backward(upstream)
    assert_close(conditioning.weight.grad, one_hot.T @ upstream)


@pytest.mark.parametrize("positions", [(), (3,), (3, 2)], ids=str)
def test_context_of_a_row_reaches_every_position(positions):
    conditioning = Conditioning(SPEC, 4, num_classes=None, context_size=2, zero=False)
    context, h = torch.randn(6, 2), torch.randn(6, *positions, 5)
    added = conditioning(context, h).expand(6, *positions, 4)
    expected = (context @ conditioning.weight).view(6, *[1] * len(positions), 4).expand_as(added)
    assert_close(added, expected)


@pytest.mark.parametrize("cells", [(), (3,)], ids=["sequence", "grid"])
def test_context_of_a_position_reaches_that_position(cells):
    conditioning = Conditioning(SPEC, 4, num_classes=3, context_size=None, zero=False)
    y = torch.randint(3, (6, 2))
    added = conditioning(y, torch.randn(6, 2, *cells, 5)).expand(6, 2, *cells, 4)
    expected = conditioning.weight[y]
    assert_close(added, expected.unsqueeze(2).expand_as(added) if cells else expected)


@pytest.mark.parametrize("classes", [3, 50])
def test_a_bias_is_added_where_there_are_fewer_rows(classes):
    """To the table, or to what the labels look up, which are the same numbers to the bit."""
    torch.manual_seed(0)
    conditioning = Conditioning(SPEC, 5, classes, None)
    conditioning.weight.data.normal_()
    labels, h, bias = torch.arange(8) % 3, torch.zeros(8, 5), torch.randn(5)
    with Making() as making:
        added = conditioning(labels, h, bias)
    assert torch.equal(added, conditioning(labels, h) + bias)
    assert max(making.elements) == 5 * 8


def test_without_a_context_it_is_nothing():
    conditioning = Conditioning(SPEC, 4, None, None)
    assert conditioning(torch.zeros(6), torch.randn(6, 5)) is None
    assert not list(conditioning.parameters())


@pytest.mark.parametrize("kind", ["num_classes", "context_size"])
def test_starts_at_zero_or_as_heavy_as_the_activation(kind):
    options = {"num_classes": None, "context_size": None, kind: 16}
    assert not Conditioning(SPEC, 1000, **options).weight.any()
    context = torch.randint(16, (200,)) if kind == "num_classes" else torch.randn(200, 16)
    h = torch.randn(200, 500)
    added = Conditioning(SPEC, 1000, **options, zero=False)(context, h)
    assert 1.0 < (added.std() / nn.Linear(500, 1000)(h).std()).item() < 2.0


@pytest.mark.parametrize("size", [0, -2])
@pytest.mark.parametrize("kind", ["num_classes", "context_size"])
def test_refuses_a_context_of_no_size(kind, size):
    with pytest.raises(EstimatorError, match=rf"`{kind}` to be at least 1, but got \[{size}\]"):
        Conditioning(SPEC, 4, **{"num_classes": None, "context_size": None, kind: size})


def test_refuses_two_contexts():
    with pytest.raises(EstimatorError, match=r"for boundary 'net.1', but got both"):
        Conditioning(SPEC, 4, 3, 2)


@pytest.mark.parametrize("context", [(6,), (6, 3), (6, 3, 2)], ids=str)
def test_any_beginning_of_the_rows_is_aligned(context):
    check_aligned(context, (6, 3, 2), "net.1")


@pytest.mark.parametrize("context", [(), (1,), (6, 1), (3,), (6, 3, 2, 1)], ids=str)
def test_anything_else_is_refused(context):
    with pytest.raises(EstimatorError, match=r"\(6,\) or \(6, 3\) or \(6, 3, 2\), but got \("):
        check_aligned(context, (6, 3, 2), "net.1")


def test_split_undoes_join():
    h = (torch.randn(6, 3, 5), torch.randn(6, 3, 2))
    joined = join(h)
    assert joined.shape == (6, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(split(joined, h), h, strict=True))
    assert join(h[:1]) is h[0]


def test_joint_width():
    leaves = [LeafSpec(shape, torch.float32) for shape in ((3, 5), (3, 2))]
    assert joint_width(BoundarySpec("net.1", tuple(leaves))) == 7
    other = LeafSpec((4, 2), torch.float32)
    with pytest.raises(
        EstimatorError, match=r"boundary 'net.1', but got rows of shapes \[\(3, 5\), \(4, 2\)"
    ):
        joint_width(BoundarySpec("net.1", (leaves[0], other)))
