"""Laws of the context, each over every row of the table that is given one."""

import pytest
import torch
from tables import CLASSES, CONDITIONED, each, exact, given, lesson, record_of
from torch import nn

from lightning_dni.errors import EstimatorError


@each(CONDITIONED)
def test_context_conditions(row):
    """From its own first steps on, not only with weights that a test has stirred."""
    h, context, feedback = row.sample()
    estimator = row.build()
    optimizer = torch.optim.Adam([*estimator.parameters(), nn.Parameter(torch.zeros(()))], lr=1e-2)
    for _ in range(2 if row.learned else 0):
        optimizer.zero_grad()
        estimator.loss(record_of(estimator, h, context), feedback).backward()
        optimizer.step()
    other = (context + 1) % CLASSES if row.context.endswith("labels") else context.flip(0)
    pairs = zip(given(estimator, h, context, feedback), given(estimator, h, other, feedback), strict=True)
    assert all(not torch.allclose(a, b) for a, b in pairs)


@each([row for row in CONDITIONED if row.context.endswith("labels")])
def test_accepts_labels_of_any_integer_type(row):
    h, context, feedback = row.sample()
    expected = given(row.stirred(), h, context, feedback)
    for dtype in (torch.uint8, torch.int32):
        exact(given(row.stirred(), h, context.to(dtype), feedback), expected)
        if row.learned:
            again = lesson(row.stirred(), h, context.to(dtype), feedback)
            exact(again, lesson(row.stirred(), h, context, feedback))


@each(CONDITIONED)
def test_refuses_a_context_that_would_be_broadcast(row):
    h, context, feedback = row.sample()
    for wrong in (context.unsqueeze(1), context[:1], torch.cat([context, context])):
        with pytest.raises(EstimatorError, match=r"at boundary 'net.1', of shape \(6,.* but got \("):
            given(row.stirred(), h, wrong, feedback)
