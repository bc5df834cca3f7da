"""What estimators tell the one below, from stage to stage and in one process."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, mlp
from pipeline.staged import (
    OPTIMIZERS,
    WIDTHS,
    Blind,
    assert_same_bits,
    batches,
    loss_of,
    one_process,
    together,
)
from torch import nn

from lightning_dni.core import GradientEstimator, Signal
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticCascade
from lightning_dni.pipeline.together import StagesTogether


class Following(GradientEstimator):
    """Its weight follows what is told of the estimator above, or the mean of the network's output."""

    needs = frozenset({Signal.ESTIMATOR_ABOVE})

    def __init__(self, spec, tell=lambda weight: weight):
        super().__init__()
        self.weight, self.tell = nn.Parameter(torch.zeros(())), tell

    def synthesize(self, h, context, state):
        return (self.weight * h[0],), None

    def loss(self, record, feedback):
        told = feedback.output.abs().mean() if feedback.above is None else feedback.above
        return (self.weight - told.max()).square()

    def value(self, record):
        return self.tell(self.weight)


@pytest.mark.parametrize("tell", [lambda weight: weight, lambda weight: weight.expand(4)])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_view_of_a_weight_is_told_as_it_was(tell, steps):
    """The stage above has stepped when the one below learns."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dtype=torch.float32), batches(8)
    options = {"estimator_optimizer": partial(torch.optim.SGD, lr=0.1), "estimator_steps": steps}
    staged = together(model, partial(Following, tell=tell), data, **options)
    for batch in data:
        staged.step([batch])
    engine, _ = one_process(model, partial(Following, tell=tell), data, **options)
    assert all(e.weight for e in engine.estimators.values())
    assert_same_bits(staged, engine, model)


@pytest.mark.parametrize("train", [one_process, lambda *made: together(*made).step(made[2])])
def test_what_is_no_tensor_is_refused(train):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(1)
    make = partial(Following, tell=lambda weight: (weight, weight))
    with pytest.raises(EstimatorError, match=r"`value` of Following at boundary '1' .* but got tuple"):
        train(model, make, data)


@pytest.mark.parametrize("staleness", [0, 2])
def test_below_a_stage_that_passes_on_no_gradient_nothing_is_learnt(staleness):
    torch.manual_seed(0)
    data, blind = batches(12), range(6, 9)
    model = nn.Sequential(nn.Linear(5, 6), Blind(), nn.Linear(7, CLASSES))
    made = (["0", "1"], partial(CriticCascade, num_classes=CLASSES), loss_of, OPTIMIZERS["sgd"], data[0])
    staged = StagesTogether(model, *made, staleness, seed=3)
    weights, learnt_from = [torch.zeros(CLASSES, 6)], []
    for i, batch in enumerate(data):
        staged.models[1][1].blind = i in blind
        staged.step([batch])
        weights.append(staged.engines[0].estimators["0"].head.stack.layers[0].weight.detach().clone())
        if not torch.equal(*weights[-2:]):
            learnt_from.append(i - staleness)
    first = staleness + 1  # until then the critic above has learnt nothing, and all predict the same
    assert learnt_from == [i for i in range(first, 12 - staleness) if i not in blind]
