"""A batch falls into microbatches by rows, whatever it is built of."""

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from lightning_dni.errors import StageError
from lightning_dni.pipeline.microbatch import split_batch


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "train"
    more: Any = None
    made: int = field(init=False, default=7)


class Encoding(UserDict):
    """As tokenizers return it."""


def rows(n=7, width=2):
    return torch.arange(float(n * width)).view(n, width)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (2, 3, 5) for n in range(m, 12)])
def test_a_tensor_is_split_as_torch_splits_it(n, m):
    for part, expected in zip(split_batch(rows(n), m), torch.tensor_split(rows(n), m), strict=True):
        assert torch.equal(part, expected)


BUILT = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered": lambda x, y: OrderedDict(x=x, y=y),
    "default": lambda x, y: defaultdict(int, x=x, y=y),
    "user dict": lambda x, y: Encoding(x=x, y=y),
    "dataclass": lambda x, y: Sample(x, more=[{"y": y}, None, 3]),
    "nested": lambda x, y: ({"deep": [(x,), Pair(x, y)]}, y),
    "list in a tuple": lambda x, y: (x, [y, y], "train", 3, None),
}


@pytest.mark.parametrize("name", BUILT)
def test_each_part_is_built_as_the_batch(name):
    build, x, y = BUILT[name], rows(), torch.arange(7)
    parts = split_batch(build(x, y), 3)
    expected = [build(a, b) for a, b in zip(x.tensor_split(3), y.tensor_split(3), strict=True)]
    for part, wanted in zip(parts, expected, strict=True):
        assert type(part) is type(wanted)
        assert_same(part, wanted)


def assert_same(part, wanted):
    if isinstance(part, Sample):
        assert (part.name, part.made) == (wanted.name, wanted.made)
        part, wanted = (part.x, part.more), (wanted.x, wanted.more)
    if isinstance(part, UserDict):
        part, wanted = dict(part), dict(wanted)
    flat, structure = pytree.tree_flatten(part)
    other, expected = pytree.tree_flatten(wanted)
    assert structure == expected
    for a, b in zip(flat, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_batch_stays_as_it_was():
    batch = {"x": rows(), "deep": Sample(rows())}
    parts = split_batch(batch, 2)
    parts[0]["x"].zero_()
    parts[0]["deep"].x.zero_()
    assert torch.equal(batch["x"], rows())
    assert torch.equal(batch["deep"].x, rows())


def test_what_has_no_rows_is_in_every_part():
    weight = torch.tensor(0.5)
    for _, scale, name, seen, sizes in split_batch((rows(), weight, "train", None, [2, 3]), 2):
        assert (scale is weight, name, seen, sizes) == (True, "train", None, [2, 3])


def test_names_of_the_rows_are_split_with_them():
    parts = split_batch((rows(3), ["a", "b", "c"], ("x", "y")), 2)
    assert [part[1:] for part in parts] == [(["a", "b"], ("x", "y")), (["c"], ("x", "y"))]


@pytest.mark.parametrize("batch", [None, iter(()), rows(1), object()])
def test_one_part_is_the_batch_itself(batch):
    assert split_batch(batch, 1)[0] is batch


def test_fewer_rows_than_parts_are_refused():
    with pytest.raises(StageError, match=r"at least 4 rows in every batch.*but got 3. Pass fewer.*drop_last"):
        split_batch((rows(3), torch.arange(3)), 4)


def test_tensors_of_different_length_are_refused():
    with pytest.raises(
        StageError, match=r"same number of rows, but got \{\"batch\['x'\]\": 4, \"batch\['deep'\]\[0\]\": 3\}"
    ):
        split_batch({"x": rows(4), "deep": [rows(3)]}, 2)


@pytest.mark.parametrize("batch", [(), {"name": "train"}, 3, [torch.tensor(1.0)]])
def test_a_batch_without_rows_is_refused(batch):
    with pytest.raises(StageError, match="Expected tensors to split into microbatches in a batch"):
        split_batch(batch, 2)


def test_what_cannot_be_opened_is_refused():
    class Graph:
        nodes = rows()

    with pytest.raises(StageError, match=r"tensors and plain values, but got Graph at batch\[1\]"):
        split_batch((rows(), Graph()), 2)
