"""ClassHead: what it makes of each form of activation, and the derivative that it gives."""

import pytest
import torch
from making import Making
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, LeafSpec, Record
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators.head import ClassHead, average_to_grid, share_labels, summed_cross_entropy


def spec_of(*shapes):
    return BoundarySpec("net.1", tuple(LeafSpec(shape, torch.float32) for shape in shapes))


def stirred_head(shape, hidden_sizes=()):
    head = ClassHead(spec_of(shape), 3, hidden_sizes)
    nn.init.normal_(head.stack.layers[-1].weight)
    return head


@pytest.mark.parametrize("hidden_sizes", [(), (8, 6)], ids=str)
@pytest.mark.parametrize(
    ("shape", "width"), [((5,), 5), ((4, 5), 5), ((3, 8, 8), 48), ((3, 7, 2), 24), ((3, 1, 1), 3)], ids=str
)
def test_width_of_its_input(shape, width, hidden_sizes):
    head = stirred_head(shape, hidden_sizes)
    assert head.stack.layers[0].in_features == width
    assert head(torch.randn(2, *shape), per_position=False).shape == (2, 3)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 9), (13, 4)], ids=str)
@pytest.mark.parametrize("grid", [(4, 4), (3, 2), (1, 1)], ids=str)
def test_average_to_grid_is_adaptive_pooling(size, grid):
    h = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, *grid, dtype=torch.float64)
    ours, theirs = average_to_grid(h, grid), F.adaptive_avg_pool2d(h, grid)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, h, upstream), torch.autograd.grad(theirs, h, upstream))


def test_cells_outnumber_pixels():
    """Of maps smaller than those it was built for, as adaptive pooling has it."""
    h = torch.randn(2, 3, 2, 3)
    assert_close(average_to_grid(h, (4, 4)), F.adaptive_avg_pool2d(h, 4))


def test_probabilities_of_certain_labels_are_the_labels():
    scores, labels = torch.randn(4, 2, 3), torch.randint(3, (4, 2))
    expected = F.cross_entropy(scores.reshape(8, 3), labels.reshape(8), reduction="sum")
    assert_close(summed_cross_entropy(scores, labels), expected)
    assert_close(summed_cross_entropy(scores, F.one_hot(labels, 3).float()), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(37,), (5, 7)], ids=str)
def test_a_share_of_labels_is_a_mixture_with_the_one_hot_to_the_bit(share, dtype, rows):
    scores, labels = torch.randn(*rows, 11).to(dtype), torch.randint(11, rows, dtype=torch.uint8)
    said, one_hot = torch.softmax(scores, -1), F.one_hot(labels.long(), 11).to(dtype)
    before = scores.clone()
    assert torch.equal(share_labels(scores, labels, share), torch.lerp(said, one_hot, share))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_share_of_labels_is_one_tensor_of_class_width(share):
    """The probabilities themselves: none of another kind beside them, and no one-hot."""
    scores, labels = torch.randn(4, 6, 5000), torch.randint(5000, (4, 6))
    with Making() as making:
        share_labels(scores, labels, share)
    assert [n for n in making.elements if n >= 5000] == [scores.numel()]


def test_as_many_positions_as_classes_are_still_labels():
    """Labels [batch, positions] have the shape of scores [batch, classes] here."""
    head = stirred_head((3, 5))
    h, labels = torch.randn(6, 3, 5), torch.randint(3, (6, 3))
    derivative, scores = head.gradient(h, labels)
    assert scores.shape == (6, 3, 3)
    x = h.clone().requires_grad_()
    F.cross_entropy(head(x, per_position=True).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert_close(derivative, x.grad)


@pytest.mark.parametrize("recorded", [True, False])
def test_scores_carry_a_graph_only_where_one_is_recorded(recorded):
    head, h, labels = stirred_head((5,)), torch.randn(6, 5), torch.zeros(6, dtype=torch.long)
    with torch.set_grad_enabled(recorded):
        derivative, scores = head.gradient(h, labels)
    assert scores.requires_grad == recorded
    assert not derivative.requires_grad
    head.loss(Record((h,), labels, (derivative,), scores), labels).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_nothing_is_padding_that_nobody_has_called_so():
    """torch's own cross-entropy would ignore it."""
    with pytest.raises(IndexError, match="-100 is out of bounds"):
        stirred_head((5,)).gradient(torch.randn(2, 5), torch.tensor([0, -100]))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_probabilities_are_zero_at_padding(share):
    """In one tensor of class width still."""
    scores, labels = torch.randn(4, 6, 5000), torch.randint(5000, (4, 6))
    expected = share_labels(scores, labels, share)
    labels[:, 4:], expected[:, 4:] = 7000, 0.0
    with Making() as making:
        found = share_labels(scores, labels, share, ignore_index=7000)
    assert [n for n in making.elements if n >= 5000] == [scores.numel()]
    assert torch.equal(found, expected)


def test_leaves_no_gradient_behind():
    head, h = stirred_head((5,), (4,)), torch.randn(6, 5, requires_grad=True)
    head.gradient(h, torch.zeros(6, dtype=torch.long))
    assert h.grad is None
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize(
    ("shape", "num_classes", "hidden_sizes", "message"),
    [
        ((5,), 1, (), r"`num_classes` to be at least 2, but got \[1\]"),
        ((5,), 3, (4, 0), r"`hidden_sizes` to be at least 1, but got \[4, 0\]"),
        ((), 3, (), r"vectors, sequences or .* 'net.1', but got rows of shape \(\)"),
        ((2, 3, 4, 5), 3, (), r"but got rows of shape \(2, 3, 4, 5\). Choose another"),
    ],
)
def test_refuses(shape, num_classes, hidden_sizes, message):
    with pytest.raises(EstimatorError, match=message):
        ClassHead(spec_of(shape), num_classes, hidden_sizes)


def test_refuses_several_leaves():
    with pytest.raises(BoundaryError, match=r"one tensor at boundary 'net.1', but got 2"):
        ClassHead(spec_of((5,), (5,)), 3, ())
