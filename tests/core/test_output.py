"""The network's output, of which estimators are told, where the step changes it in place."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, blobs, mlp, same_bits, weights
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    CriticCascade,
    CriticEstimator,
    DirectFeedbackAlignmentEstimator,
    KickbackEstimator,
    SobolevEstimator,
)


def cool(output):
    return output.div_(2.0)


def train(estimator, change, **options):
    """What four steps make of a model and its estimators."""
    torch.manual_seed(0)
    model = mlp()
    engine = DNIEngine(model, ["0", "1"], estimator, seed=1, **options)
    user = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine:
        for _ in range(4):
            batch = blobs()
            user.zero_grad()
            with engine.training_step(batch):
                loss = F.cross_entropy(change(model(batch[0])), batch[1])
            engine.backward(loss)
            user.step()
            engine.update_estimators()
    return weights(model) | weights(torch.nn.ModuleList(engine.estimators.values()))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SobolevEstimator, {}),
        (KickbackEstimator, {}),
        (CriticEstimator, {"estimator_steps": 2}),
        (CriticCascade, {"estimator_steps": 2}),
    ],
)
def test_what_an_estimator_has_still_to_learn_from_is_not_changed(make, options):
    with pytest.raises(EstimatorError, match=rf"output for {make.__name__} .* was changed in place\. Make"):
        train(partial(make, num_classes=CLASSES), cool, **options)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (partial(CriticEstimator, num_classes=CLASSES), {}),
        (partial(CriticEstimator, num_classes=CLASSES), {"bp_lambda": 0.5}),
        (partial(CriticCascade, num_classes=CLASSES), {}),
        (DirectFeedbackAlignmentEstimator, {}),
    ],
)
def test_what_was_learnt_from_may_change(estimator, options):
    there, here = (train(estimator, change, **options) for change in (cool, lambda output: output / 2.0))
    assert same_bits(there, here)
