"""ZeroEstimator gives nothing, learns nothing, and nothing below it moves."""

import pytest
import torch
from tables import TwoLeaves
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import ZeroEstimator


@pytest.mark.parametrize("below", [nn.Linear(4, 5), TwoLeaves(4)], ids=["one leaf", "two leaves"])
def test_nothing_below_moves_by_one_bit(below):
    class Top(nn.Linear):
        def forward(self, h):
            return super().forward(torch.cat(h, 1) if isinstance(h, tuple) else h)

    model = nn.Sequential(below, Top(7 if isinstance(below, TwoLeaves) else 5, 3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    engine = DNIEngine(model, ["0"], ZeroEstimator)
    with engine:
        for _ in range(3):
            optimizer.zero_grad()
            with engine.training_step():
                loss = F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,)))
            engine.backward(loss)
            optimizer.step()
            engine.update_estimators()
    for name, parameter in model.named_parameters():
        if name.startswith("0."):
            assert parameter.grad is None
        assert torch.equal(parameter, before[name]) == name.startswith("0.")
    assert engine.estimators["0"].state_dict() == {}
