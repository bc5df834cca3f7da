"""MLPEstimator against torch's own layers on everything that it sees, side by side."""

import pytest
import torch
from tables import CLASSES, ESTIMATORS, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import MLPEstimator

SPEC = BoundarySpec("net.1", (LeafSpec((5,), torch.float32),))
ROWS = [row for row in ESTIMATORS if row.id.startswith("mlp")]


def twin_of(estimator):
    """The same network as nn.Sequential on [h, context]."""
    layers = []
    for k, layer in enumerate(estimator.stack.layers):
        weight, context = layer.weight.data, estimator.conditioning.weight
        if k == 0 and context is not None:
            weight = torch.cat([weight, context.data.T], 1)
        linear = nn.Linear(*reversed(weight.shape), dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.clone(), layer.bias.data.clone()
        norm = []
        if k and estimator.stack.norms is not None:
            ours = estimator.stack.norms[k - 1]
            norm = [nn.BatchNorm1d(weight.shape[1], dtype=weight.dtype)]
            norm[0].load_state_dict(ours.state_dict(), strict=False)
        layers += [*norm, nn.ReLU(), linear] if k else [linear]
    return nn.Sequential(*layers)


def seen_by(row, h, context):
    """[h, context] for every position, one below the other."""
    x = torch.cat(h, -1)
    if context is not None:
        c = F.one_hot(context, CLASSES).to(x.dtype) if row.context.endswith("labels") else context
        x = torch.cat([x, c.unsqueeze(1).expand(-1, x.shape[1], -1) if c.ndim < x.ndim else c], -1)
    return x.flatten(0, -2)


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
        prediction = twin(seen_by(row, h, context))
        if estimator.ignore_index is not None:
            prediction = prediction * (context != estimator.ignore_index).flatten().unsqueeze(1)
        assert_close(torch.cat(record.gradient, -1).flatten(0, -2), prediction)
        for optimizer in (ours, twins):
            optimizer.zero_grad()
        estimator.loss(record, feedback).backward()
        error = prediction - torch.cat(feedback.target, -1).flatten(0, -2)
        (error.pow(2).sum() / len(h[0])).backward()
        for optimizer in (ours, twins):
            optimizer.step()
    expected = dict(twin.state_dict())
    for name, value in twin_of(estimator).state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def test_rebuilds_its_graph_for_the_loss():
    assert not MLPEstimator.keeps_graph


def test_default_is_that_of_the_paper():
    layers = MLPEstimator(SPEC).stack.layers
    assert [(layer.in_features, layer.out_features) for layer in layers] == [
        (5, 1024),
        (1024, 1024),
        (1024, 5),
    ]


@pytest.mark.parametrize("width", [0, -1])
def test_refuses_empty_layers(width):
    with pytest.raises(EstimatorError, match=rf"`hidden_sizes` to be at least 1, but got \[4, {width}\]"):
        MLPEstimator(SPEC, hidden_sizes=(4, width))
