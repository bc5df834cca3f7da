"""A fit on padded sequences, or with padded rows, is the one on what is no padding."""

from functools import partial

import pytest
import torch
from fits import CLASSES, FEATURES, Net, dni, fit
from padded import HEADS, PADDING, REGRESSORS
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

ROWS = 8
MAKES = {"linear": REGRESSORS["linear"], **HEADS}
each_kind = pytest.mark.parametrize("name", MAKES)


class Tokens(Net):
    """Its loss is a mean over labels that are none of padding."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten(), ignore_index=PADDING)


def learnt(make, data, batch_size, lr, **options):
    """Weights of the module and of the estimators after a fit."""
    torch.manual_seed(0)
    module = Tokens()
    strategy = dni(
        estimator=partial(make, num_classes=CLASSES, **options),
        estimator_optimizer=partial(torch.optim.SGD, lr=lr),
        loss_denominator=lambda batch, h: float((batch[1] != PADDING).sum()),
    )
    train = DataLoader(TensorDataset(*data), batch_size)
    fit(module, strategy, train, max_epochs=3, precision="64-true")
    estimators = {n: e.state_dict() for n, e in strategy.estimators.items()}
    assert all(v.any() for state in estimators.values() for v in state.values())
    return module.state_dict(), estimators


def sample(*shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, shape, generator=generator)


@each_kind
def test_padded_sequences_are_the_short_ones(name):
    x, labels = sample(3 * ROWS, 5)
    short = learnt(MAKES[name], (x[:, :3], labels[:, :3]), ROWS, lr=0.1)
    labels[:, 3:] = PADDING
    padded = learnt(MAKES[name], (x, labels), ROWS, lr=0.1, ignore_index=PADDING)
    assert_close(padded, short, rtol=0, atol=1e-10)


@each_kind
def test_a_padded_row_is_no_row(name):
    """But that an estimator's loss is averaged over all rows, so its rate makes up for it."""
    x, labels = sample(3 * ROWS)
    kept = torch.arange(3 * ROWS) % ROWS < 5
    fewer = learnt(MAKES[name], (x[kept], labels[kept]), 5, lr=0.1)
    labels[~kept] = PADDING
    padded = learnt(MAKES[name], (x, labels), ROWS, lr=0.1 * ROWS / 5, ignore_index=PADDING)
    assert_close(padded, fewer, rtol=0, atol=1e-10)
