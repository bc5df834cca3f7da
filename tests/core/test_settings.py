"""What holds for a step turns gradients per row into gradients of the user's loss."""

import pytest
import torch

from lightning_dni.core.settings import StepSettings

H = [torch.zeros(8, 3)]


def settings(**options):
    return StepSettings(batch=("x", "y"), context=None, bp_lambda={}, **options)


@pytest.mark.parametrize(
    ("options", "elements", "expected"),
    [
        ({}, None, 1 / 8),
        ({"accumulate": 4}, None, 1 / 32),
        ({"loss_denominator": "sum"}, None, 1.0),
        ({"loss_denominator": "elements"}, 5, 1 / 40),
        ({"loss_denominator": lambda batch, h: 2.0 * len(batch) * len(h)}, None, 1 / 12),
    ],
)
def test_the_factor_undoes_what_the_loss_was_divided_by(options, elements, expected):
    assert settings(**options).factor(H, "abc", elements) == expected


def test_the_scaler_multiplies_without_leaving_its_device():
    factor = settings(scale=torch.tensor(16.0)).factor(H, None, None)
    assert torch.equal(factor, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("word", "seen", "counts"), [("elements", None, True), ("elements", 3, False), ("batch", None, False)]
)
def test_elements_are_counted_until_they_are_known(word, seen, counts):
    assert settings(loss_denominator=word, elements_per_row=seen).counts_elements is counts
