"""Labels of padding in the stages of a pipeline, without processes."""

from functools import partial

import pytest
import torch
from core.nets import CLASSES, mlp
from padded import BY_ROW, MAKES, PADDING
from pipeline.staged import assert_same_bits, train_whole
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError
from lightning_dni.pipeline.together import StagesTogether

WIDTHS = (5, 6, 7, CLASSES)


def summed(model, batch):
    scores = model(batch[0])
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten(), ignore_index=PADDING, reduction="sum")


def per_row(model, batch):
    return summed(model, batch) / len(batch[0])


def batches(*shape, count=9):
    torch.manual_seed(1)
    shapes = [(shape[0] - i % 2, *shape[1:]) for i in range(count)]
    return [(torch.randn(*s, 5, dtype=torch.float64), torch.randint(CLASSES, s)) for s in shapes]


def padded(data, pick):
    """The same with labels of padding where `pick` says."""
    found = [(x, labels.clone()) for x, labels in data]
    for _, labels in found:
        labels[pick] = PADDING
    return found


def together(make, data, staleness=0, loss_of=per_row, lr=0.1, **options):
    torch.manual_seed(0)
    teacher = partial(torch.optim.SGD, lr=lr)
    shared = {"seed": 3, "labels": 1, "estimator_optimizer": teacher, **options}
    user = partial(torch.optim.SGD, lr=0.05)
    staged = StagesTogether(mlp(WIDTHS), ["0", "1"], make, loss_of, user, data[0], staleness, **shared)
    for batch in data:
        staged.step([batch])
    return staged


def learnt(staged):
    """Weights of the whole model and of all estimators, all of which have moved."""
    states = {n: e.state_dict() for engine in staged.engines for n, e in engine.estimators.items()}
    assert len(states) == 2
    assert all(v.any() for state in states.values() for v in state.values())
    return staged.state_dict(), states


def one_process(make, data):
    torch.manual_seed(0)
    model, teacher = mlp(WIDTHS), partial(torch.optim.SGD, lr=0.1)
    engine = DNIEngine(model, ["0", "1"], make, rng="stage", seed=3, labels=1, estimator_optimizer=teacher)
    train_whole(engine, model, torch.optim.SGD(model.parameters(), lr=0.05), data, per_row)
    return engine, model


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (8, 4)) for name in MAKES), *((name, (8,)) for name in BY_ROW)]
)
def test_without_lag_stages_are_one_process(name, shape):
    make = partial(BY_ROW[name], num_classes=CLASSES, ignore_index=PADDING)
    data = padded(batches(*shape), (..., slice(2, None)))
    assert_same_bits(together(make, data), *one_process(make, data))


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("name", MAKES)
def test_padded_sequences_are_the_short_ones(name, staleness):
    make, data = partial(MAKES[name], num_classes=CLASSES), batches(8, 4)
    short = together(make, [(x[:, :3], labels[:, :3]) for x, labels in data], staleness)
    whole = together(partial(make, ignore_index=PADDING), padded(data, (..., slice(3, None))), staleness)
    assert_close(learnt(whole), learnt(short), rtol=0, atol=1e-10)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("name", BY_ROW)
def test_a_padded_row_is_no_row(name, staleness):
    """But that an estimator's loss is averaged over all rows, so its rate makes up for it."""
    make = partial(BY_ROW[name], num_classes=CLASSES)
    data = [batches(8)[0] for _ in range(9)]
    options = {"loss_of": summed, "loss_denominator": "sum"}
    fewer = together(make, [(x[:5], labels[:5]) for x, labels in data], staleness, lr=0.05, **options)
    make = partial(make, ignore_index=PADDING)
    whole = together(make, padded(data, slice(5, None)), staleness, lr=0.05 * 8 / 5, **options)
    assert_close(learnt(whole), learnt(fewer), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("staleness", [0, 1])
def test_labels_of_padding_are_refused_without_it(name, staleness):
    data = padded(batches(8, 4), (..., slice(3, None)))
    with pytest.raises(EstimatorError, match=r"boundary '0', .* from -100 to 2.* take `ignore_index`"):
        together(partial(MAKES[name], num_classes=CLASSES), data, staleness)
