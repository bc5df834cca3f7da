"""ConvEstimator against torch's own layers on the activation with explicit label planes."""

import pytest
import torch
from tables import CLASSES, ESTIMATORS, record_of
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import ConvEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("conv")]


def spec_of(*shapes):
    return BoundarySpec("net.1", tuple(LeafSpec(shape, torch.float32) for shape in shapes))


def twin_of(estimator):
    convolution, norm = {
        3: (nn.Conv1d, nn.BatchNorm1d),
        4: (nn.Conv2d, nn.BatchNorm2d),
    }[estimator.stack.layers[0].weight.ndim]
    layers = []
    for k, layer in enumerate(estimator.stack.layers):
        after, before, size = layer.weight.shape[:3]
        twin = convolution(before, after, size, padding="same").double()
        twin.load_state_dict(layer.state_dict())
        if k:
            layers += [norm(before).double(), nn.ReLU()]
            layers[-2].load_state_dict(estimator.stack.norms[k - 1].state_dict(), strict=False)
        layers.append(twin)
    return nn.Sequential(*layers)


def with_planes(row, h, labels):
    """`h` and one plane per class, written out cell by cell."""
    if row.context == "none":
        return h
    planes = h.new_zeros(len(h), CLASSES, *h.shape[2:])
    for k, label in enumerate(labels):
        planes[k, label] = 1.0
    return torch.cat([h, planes], 1)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_equals_a_network_of_torch_layers(row):
    """Predictions, weights after each of several steps, and the running averages of batch norm."""
    estimator = row.stirred(dtype=torch.float64)
    twin = twin_of(estimator)
    ours = torch.optim.Adam(estimator.parameters(), lr=0.05)
    twins = torch.optim.Adam(twin.parameters(), lr=0.05)
    for seed in range(3):
        h, context, feedback = row.sample(seed=seed, dtype=torch.float64)
        record = record_of(estimator, h, context)
        prediction = twin(with_planes(row, h[0], context))
        assert_close(record.gradient[0], prediction)
        for optimizer in (ours, twins):
            optimizer.zero_grad()
        estimator.loss(record, feedback).backward()
        ((prediction - feedback.target[0]).pow(2).sum() / len(prediction)).backward()
        for optimizer in (ours, twins):
            optimizer.step()
    expected = dict(twin.state_dict())
    for name, value in twin_of(estimator).state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def test_accepts_volumes():
    estimator = ConvEstimator(spec_of((2, 3, 4, 5)), hidden_channels=(3,), kernel_size=3, num_classes=CLASSES)
    h = torch.randn(2, 2, 3, 4, 5)
    gradient, _ = estimator.synthesize((h,), torch.tensor([0, 2]), None)
    assert gradient[0].shape == h.shape


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5,), {}, r"feature maps .* 'net.1', but got rows of shape \(5,\). Use LinearEstimator"),
        ((2, 3, 4, 5, 6), {}, r"feature maps .* but got rows of shape \(2, 3, 4, 5, 6\)"),
        ((3, 6), {"kernel_size": 4}, "`kernel_size` to be odd and positive, but got 4"),
        ((3, 6), {"kernel_size": -1}, "`kernel_size` to be odd and positive, but got -1"),
        ((3, 6), {"hidden_channels": (4, 0)}, r"`hidden_channels` to be at least 1, but got \[4, 0\]"),
        ((3, 6), {"num_classes": 0}, r"`num_classes` to be at least 1, but got \[0\]"),
    ],
)
def test_refuses(shape, options, message):
    with pytest.raises(EstimatorError, match=message):
        ConvEstimator(spec_of(shape), **options)


def test_refuses_several_leaves():
    with pytest.raises(BoundaryError, match=r"one tensor at boundary 'net.1', but got 2"):
        ConvEstimator(spec_of((3, 6), (3, 6)))


def test_refuses_a_label_per_position():
    estimator = ConvEstimator(spec_of((3, 6)), (4,), num_classes=CLASSES)
    with pytest.raises(EstimatorError, match=r"of shape \(2,\), but got \(2, 6\)"):
        estimator.synthesize((torch.randn(2, 3, 6),), torch.zeros(2, 6, dtype=torch.long), None)
