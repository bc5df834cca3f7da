"""LowRankEstimator against the products written out, and what it costs with a vocabulary."""

import pytest
import torch
from making import Making
from tables import CLASSES, ESTIMATORS, each, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LowRankEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("low_rank")]
VOCABULARY = 50_000


@each(ROWS)
def test_equals_the_products_written_out(row):
    """Predictions, and weights after each of several steps of Adam."""
    estimator = row.stirred(dtype=torch.float64)
    twin = {n: p.detach().clone().requires_grad_() for n, p in estimator.named_parameters()}
    ours = torch.optim.Adam(estimator.parameters(), lr=0.05)
    twins = torch.optim.Adam(twin.values(), lr=0.05)
    for seed in range(3):
        h, context, feedback = row.sample(seed=seed, dtype=torch.float64)
        narrow = torch.cat(h, -1) @ twin["down.weight"].T
        if context is not None:
            c = F.one_hot(context, CLASSES).double() if row.context.endswith("labels") else context
            narrow = narrow + c @ twin["conditioning.weight"]
        prediction = narrow @ twin["up.weight"].T + twin["up.bias"]
        if estimator.ignore_index is not None:
            prediction = prediction * (context != estimator.ignore_index).unsqueeze(-1)
        record = record_of(estimator, h, context)
        assert_close(torch.cat(record.gradient, -1), prediction, rtol=0, atol=1e-10)
        ours.zero_grad()
        twins.zero_grad()
        estimator.loss(record, feedback).backward()
        ((prediction - torch.cat(feedback.target, -1)).pow(2).sum() / len(h[0])).backward()
        ours.step()
        twins.step()
    assert_close(dict(estimator.named_parameters()), twin, rtol=0, atol=1e-10)


def test_next_tokens_are_looked_up_in_a_narrow_table():
    """A step on 12 x 20 tokens of 50,000 kinds makes no tensor larger than the table's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 5))
    engine = DNIEngine(
        model,
        ["1"],
        lambda spec: LowRankEstimator(spec, rank=4, num_classes=VOCABULARY),
        labels=1,
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    x, tokens = torch.randn(12, 20, 6), torch.randint(VOCABULARY, (12, 20))
    with engine, Making() as making:
        for _ in range(2):
            with engine.training_step((x, tokens)):
                loss = model(x).square().mean()
            engine.backward(loss)
            engine.update_estimators()
    assert max(making.elements) == VOCABULARY * 4
    parameters = sum(p.numel() for p in engine.estimators["1"].parameters())
    assert parameters == VOCABULARY * 4 + 2 * 4 * 64 + 64


def test_rank_bounds_the_rank_of_the_map():
    estimator = LowRankEstimator(BoundarySpec("net.1", (LeafSpec((9,), torch.float64),)), rank=2).double()
    for layer in (estimator.down, estimator.up):
        nn.init.normal_(layer.weight)
    (said,), _ = estimator.synthesize((torch.eye(9).double(),), None, None)
    assert torch.linalg.matrix_rank(said.detach()) == 2


def test_learns_a_map_of_its_rank():
    """The target of a linear network above with two outputs and squared error: A = W^T W, of rank 2."""
    torch.manual_seed(0)
    w, spec = torch.randn(2, 9).double() / 3, BoundarySpec("net.1", (LeafSpec((9,), torch.float64),))
    errors = []
    for rank in (1, 2):
        estimator = LowRankEstimator(spec, rank=rank).double()
        optimizer = torch.optim.Adam(estimator.parameters(), lr=0.04)
        for _ in range(300):
            h = torch.randn(64, 9).double()
            target = h @ w.T @ w
            optimizer.zero_grad()
            loss = estimator.loss(record_of(estimator, (h,), None), Feedback(target=(target,)))
            loss.backward()
            optimizer.step()
        errors.append(float(loss.detach() / target.square().sum(1).mean()))
    assert errors[1] < 1e-3 < 0.05 < errors[0]


@pytest.mark.parametrize("rank", [0, -1])
def test_refuses_an_empty_rank(rank):
    with pytest.raises(EstimatorError, match=rf"`rank` to be at least 1, but got \[{rank}\]"):
        LowRankEstimator(BoundarySpec("net.1", (LeafSpec((5,), torch.float32),)), rank=rank)
