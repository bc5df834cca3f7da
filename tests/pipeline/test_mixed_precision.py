"""Stages under autocast, without processes: they are one process to the bit."""

import pytest
import torch
from core.nets import CLASSES, VECTOR_ESTIMATORS
from pipeline.families import FAMILIES
from pipeline.staged import OPTIMIZERS, TOLD, assert_same_bits, train_whole

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import FeedbackAlignmentEstimator
from lightning_dni.pipeline.together import StagesTogether

ESTIMATORS = (
    {name: VECTOR_ESTIMATORS[name] for name in ("linear", "mlp", "critic")}
    | TOLD
    | {"feedback alignment": FeedbackAlignmentEstimator}
)


@pytest.mark.filterwarnings("ignore:.*hybrid with backprop")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_lag_stages_are_one_process(name):
    family, estimator = FAMILIES["bfloat16"], ESTIMATORS[name]
    torch.manual_seed(0)
    model, data = family.make(), [family.batch(rows) for rows in (6, 6, 2 * CLASSES - 1, 6)]
    sgd, shared = OPTIMIZERS["sgd"], {"seed": 3}
    staged = StagesTogether(model, family.boundaries, estimator, family.step, sgd, data[0], **shared)
    losses = [staged.step([batch]) for batch in data]
    engine = DNIEngine(model, family.boundaries, estimator, rng="stage", **shared)
    expected = train_whole(engine, model, sgd(model.parameters()), data, family.step)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, engine, model)
