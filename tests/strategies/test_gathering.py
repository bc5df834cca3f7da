"""What the stages hold, brought to rank 0: the same values, whatever their size and kind."""

from collections import OrderedDict

import torch
from processes import on_ranks

from lightning_dni.strategies.gathering import LARGE, gather

LARGE_ENOUGH = LARGE // 2


def held(rank):
    """Small and large tensors, of several kinds and layouts, in all that a state is made of."""
    large = torch.arange(LARGE_ENOUGH, dtype=torch.float64) + rank
    return {
        "state": {rank: {"moment": large.to(torch.bfloat16), "step": torch.tensor(float(rank))}},
        "estimators": OrderedDict(weight=large.reshape(2, -1).t(), empty=torch.empty(0, 3)),
        "context": [torch.arange(LARGE_ENOUGH) % (rank + 2) == 0, None, "text", 0.5, (rank, True)],
        "none": {},
    }


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def gathered(rank):
    found = gather(held(rank), torch.device("cpu"))
    if rank == 0:
        for source, value in enumerate(found):
            assert_equal(value, held(source))
    return found is None


def test_rank_zero_has_what_every_process_has():
    assert on_ranks(gathered, world_size=3) == [False, True, True]
