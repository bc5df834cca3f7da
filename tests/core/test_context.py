"""The context is found where it is, and refused where it does not fit."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from core.nets import CLASSES, attached, blobs, mlp, run_step
from torch import Tensor

from lightning_dni.core.context import LABEL_KEYS, find_context
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator, LocalLossEstimator

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", ["target", "image"])


@dataclass
class Sample:
    image: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], (X, Y, X), Pair(Y, X), Sample(X, Y), *({"x": X, key: Y} for key in LABEL_KEYS)]
)
def test_auto_finds_the_labels(batch):
    assert find_context(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}, {"label": "cat"}, "ab", None, (X, "cat"), 3])
def test_auto_finds_nothing_rather_than_something_else(batch):
    assert find_context(batch) is None


@pytest.mark.parametrize(
    ("batch", "labels"),
    [
        ((X, X, Y), 2),
        ((X, Y), -1),
        ({"digit": Y}, "digit"),
        (Sample(X, Y), "y"),
        (Pair(Y, X), "target"),
        ((X, {"digit": Y}), lambda batch: batch[1]["digit"]),
    ],
)
def test_labels_are_taken_where_they_are_said_to_be(batch, labels):
    assert find_context(batch, labels) is Y


def test_no_labels_are_taken_where_none_are_wanted():
    assert find_context((X, Y), None) is None


@pytest.mark.parametrize(
    ("batch", "labels"), [((X, Y), 2), ({"x": X}, "digit"), (Sample(X, Y), "digit"), (None, 1)]
)
def test_absent_labels_are_refused(batch, labels):
    with pytest.raises(EstimatorError, match=rf"Expected `labels={labels!r}` to be in the batch"):
        find_context(batch, labels)


def test_labels_that_are_no_tensor_are_refused():
    with pytest.raises(EstimatorError, match="to give a tensor from the batch, but got list"):
        find_context((X, [0, 1]), 1)


def refuse(match, labels, estimator=None, batch=None):
    model = mlp()
    engine = attached(model, ["0"], estimator or partial(LinearEstimator, num_classes=CLASSES), labels=labels)
    with pytest.raises(EstimatorError, match=match):
        run_step(engine, model, batch or blobs())


def test_a_missing_context_names_boundary_and_remedy():
    refuse("labels or a context for LinearEstimator at boundary '0', but got none.*`labels=`", None)


def test_labels_above_the_classes_are_refused():
    refuse(r"labels in \[0, 3\) for LinearEstimator at boundary '0', but got values from 1 to 3",
           lambda batch: torch.tensor([1, 2, 3, 1, 1, 1, 1, 1]))  # fmt: skip


def test_negative_labels_are_refused():
    refuse(r"labels in \[0, 3\).*from -100 to 1", lambda batch: torch.tensor([1, -100, 1, 1, 1, 1, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_labels_that_are_no_integers_are_refused(dtype):
    refuse(rf"integer labels for LinearEstimator at boundary '0', but got {dtype}.*`context_size`",
           lambda batch: batch[1].to(dtype))  # fmt: skip


@pytest.mark.parametrize("context", [torch.zeros(8, 5), torch.zeros(8, 4, dtype=torch.long)])
def test_a_context_of_another_kind_is_refused(context):
    refuse(
        "floating-point context of width 4", lambda batch: context, partial(LinearEstimator, context_size=4)
    )


def test_bad_labels_are_refused_on_a_later_step_too():
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0"], partial(LocalLossEstimator, num_classes=CLASSES))
    for _ in range(3):
        run_step(engine, model, (x, y))
    with pytest.raises(EstimatorError, match=r"in \[0, 3\) for LocalLossEstimator at boundary '0'"):
        run_step(engine, model, (x, y + CLASSES))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("make", [LinearEstimator, LocalLossEstimator])
def test_labels_of_any_type_of_integer_are_looked_at(make, dtype):
    estimator, model = partial(make, num_classes=CLASSES), mlp()
    run_step(attached(model, ["0"], estimator, labels=lambda batch: batch[1].to(dtype)), model, blobs())
    refuse(r"\[0, 3\) for .* from 1 to 3", lambda batch: batch[1].clamp(max=1).add(2).index_fill(
        0, torch.tensor(0), 1).to(dtype), estimator)  # fmt: skip
