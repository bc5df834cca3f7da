"""LinearEstimator against a joint matrix, and against what theory says that it converges to."""

import pytest
import torch
from tables import CLASSES, ESTIMATORS, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator

ROWS = {row.id: row for row in ESTIMATORS}


def spec_of(*shapes):
    return BoundarySpec("net.1", tuple(LeafSpec(shape, torch.float64) for shape in shapes))


def joint_matrix(estimator):
    """A, B and C below one another."""
    parts = [estimator.map.weight.T, estimator.conditioning.weight, estimator.map.bias.unsqueeze(0)]
    return torch.cat([part for part in parts if part is not None]).detach()


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear-labels",
        "linear-vectors",
        "linear-leaves",
        "linear-sequence",
        "linear-sequence-labels",
        "linear-tokens",
        "linear-token-vectors",
    ],
)
def test_equals_one_matrix_on_everything_it_sees(name):
    """[h, context, 1] @ M: predictions, and M after each of several steps of Adam."""
    row = ROWS[name]
    estimator = row.build(dtype=torch.float64)
    matrix = torch.zeros_like(joint_matrix(estimator)).requires_grad_()
    ours = torch.optim.Adam(estimator.parameters(), lr=0.1)
    twins = torch.optim.Adam([matrix], lr=0.1)
    for seed in range(4):
        h, context, feedback = row.sample(seed=seed, dtype=torch.float64)
        x, target = torch.cat(h, -1), torch.cat(feedback.target, -1)
        if row.context.endswith("labels"):
            context_part = F.one_hot(context, CLASSES).double()
        else:
            context_part = x.new_zeros(*x.shape[:-1], 0) if context is None else context
        if context_part.ndim < x.ndim:
            context_part = context_part.unsqueeze(1).expand(-1, x.shape[1], -1)
        seen = torch.cat([x, context_part, torch.ones_like(x[..., :1])], -1)
        prediction = seen @ matrix
        twins.zero_grad()
        (prediction - target).pow(2).flatten(1).sum(1).mean().backward()
        twins.step()
        record = record_of(estimator, h, context)
        assert_close(torch.cat(record.gradient, -1), prediction)
        ours.zero_grad()
        estimator.loss(record, feedback).backward()
        ours.step()
        assert_close(joint_matrix(estimator), matrix.detach())


def test_several_leaves_are_one_activation():
    apart, joint = LinearEstimator(spec_of((5,), (2,))).double(), LinearEstimator(spec_of((7,))).double()
    optimizers = [torch.optim.SGD(e.parameters(), lr=0.1) for e in (apart, joint)]
    for _ in range(3):
        h, target = torch.randn(6, 7).double(), torch.randn(6, 7).double()
        parts = (h[:, :5], h[:, 5:]), (target[:, :5], target[:, 5:])
        losses = []
        for e, (leaves, targets) in zip((apart, joint), (parts, ((h,), (target,))), strict=True):
            losses.append(e.loss(record_of(e, leaves, None), Feedback(target=targets)))
        assert_close(losses[0], losses[1])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(dict(apart.state_dict()), dict(joint.state_dict()))


@pytest.mark.parametrize("context", ["labels", "vectors"])
def test_converges_to_the_gradient_of_a_linear_network(context):
    """Below p = hW + b under 1/2 |p - y|^2: A = W W^T, B = -W^T, C = b W^T (Czarnecki et al. 2017).

    One-hot labels sum to one, so only B + C is determined for them.
    """
    rows, width = 64, 4
    model = nn.Sequential(nn.Identity(), nn.Linear(width, CLASSES)).double().requires_grad_(False)
    y = torch.arange(rows) % CLASSES if context == "labels" else torch.randn(rows, CLASSES).double()
    target = F.one_hot(y, CLASSES).double() if context == "labels" else y
    size = {"num_classes" if context == "labels" else "context_size": CLASSES}
    engine = DNIEngine(
        model,
        ["0"],
        lambda spec: LinearEstimator(spec, **size),
        estimator_optimizer=lambda p: torch.optim.SGD(p, lr=0.2),
    )
    h = torch.randn(rows, width).double().requires_grad_()
    with engine:
        for _ in range(400):
            with engine.training_step((h, y)):
                loss = 0.5 * (model(h) - target).pow(2).sum() / rows
            engine.backward(loss)
            engine.update_estimators()
    estimator, w, b = engine.estimators["0"], model[1].weight.T, model[1].bias
    a, bias, weight = estimator.map.weight.T, estimator.map.bias, estimator.conditioning.weight
    assert_close(a.detach(), w @ w.T, rtol=1e-6, atol=1e-8)
    if context == "vectors":
        assert_close(weight.detach(), -w.T, rtol=1e-6, atol=1e-8)
        assert_close(bias.detach(), b @ w.T, rtol=1e-6, atol=1e-8)
    assert_close((weight + bias).detach(), b @ w.T - w.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shapes", [[()], [(5,), (4, 5)], [(3, 5), (4, 5)]], ids=str)
def test_refuses_leaves_that_do_not_fit_side_by_side(shapes):
    with pytest.raises(EstimatorError, match=r"features on the last dimension .* 'net.1', but got rows of"):
        LinearEstimator(spec_of(*shapes))


def test_refuses_two_contexts():
    with pytest.raises(EstimatorError, match=r"`num_classes` or `context_size` .* got both \(3, 2\)"):
        LinearEstimator(spec_of((5,)), num_classes=3, context_size=2)
