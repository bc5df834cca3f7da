"""LocalLossEstimator against a classifier trained by hand on a detached activation."""

import pytest
import torch
from oracles import head_by_hand, scores_by_hand
from tables import ESTIMATORS, batch_for, each, loss_of, network
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LocalLossEstimator

ROWS = [row for row in ESTIMATORS if row.id.startswith("local_loss")]


@each(ROWS)
def test_equals_a_hand_written_loop(row):
    """Stages, heads and losses of five steps; the user's loss is a mean, so the stage's gradient too."""
    model, inputs = network(row, torch.float64)
    twin, _ = network(row, torch.float64)
    engine = DNIEngine(
        model,
        ["0", "1"],
        lambda spec: row.stirred(dtype=torch.float64),
        labels=1,
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    heads = [head_by_hand(row.stirred(dtype=torch.float64)) for _ in range(2)]
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD([p for m in (twin, *heads) for p in m.parameters()], lr=0.1)
    with engine:
        for seed in range(5):
            x, context, classes = batch_for(row, inputs, seed=seed, dtype=torch.float64)
            ours.zero_grad()
            with engine.training_step((x, context)):
                loss = loss_of(model(x), classes)
            engine.backward(loss)
            ours.step()
            engine.update_estimators()

            theirs.zero_grad()
            h = x
            for stage, head in zip(twin[:2], heads, strict=True):
                h = stage(h.detach())
                loss_of(scores_by_hand(head, row, h), classes).backward()
            expected = loss_of(twin[2](h.detach()), classes)
            expected.backward()
            theirs.step()
            assert_close(loss.detach(), expected.detach())
    assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    for name, head in zip("01", heads, strict=True):
        trained = head_by_hand(engine.estimators[name])
        assert_close(dict(trained.state_dict()), dict(head.state_dict()))


@each(ROWS)
def test_another_network_above_changes_no_bit_of_it(row):
    """The top is thrown about at every step; estimators and the stages below stay the same."""
    found = []
    for seed in (1, 2):
        model, inputs = network(row)
        engine = DNIEngine(model, ["0", "1"], row.make, labels=1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(seed)
        with engine:
            for k in range(10):
                x, context, classes = batch_for(row, inputs, seed=k)
                for parameter in model[2].parameters():
                    parameter.data = torch.randn(parameter.shape, generator=generator)
                optimizer.zero_grad()
                with engine.training_step((x, context)):
                    loss = loss_of(model(x), classes)
                engine.backward(loss)
                optimizer.step()
                engine.update_estimators()
        modules = [*engine.estimators.values(), model[:2]]
        found.append([t for m in modules for t in m.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(t.any()) for t in found[0])


def test_linear_head_has_a_closed_form():
    """(softmax(hW + b) - y) W^T for the stage."""
    spec = BoundarySpec("net.1", (LeafSpec((5,), torch.float64),))
    estimator = LocalLossEstimator(spec, 3).double()
    (layer,) = estimator.head.stack.layers
    nn.init.normal_(layer.weight)
    h, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    (gradient,), _ = estimator.synthesize((h,), y, None)
    error = torch.softmax(layer(h), 1) - F.one_hot(y, 3)
    assert_close(gradient, (error @ layer.weight).detach())


def test_refuses_labels_per_position_of_vectors():
    estimator = LocalLossEstimator(BoundarySpec("net.1", (LeafSpec((5,), torch.float32),)), 3)
    with pytest.raises(EstimatorError, match=r"at boundary 'net.1', of shape \(6,\), but got \(6, 2\)"):
        estimator.synthesize((torch.randn(6, 5),), torch.zeros(6, 2, dtype=torch.long), None)
