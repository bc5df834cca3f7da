"""A header says exactly what it was given, and refuses what does not fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dni.errors import StageError
from lightning_dni.pipeline.header import DTYPES, WORDS, Flag, Header, Layout, Route, decode, encode, flatten
from lightning_dni.pipeline.message import Kind

INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def layouts(draw):
    shape = draw(st.lists(st.integers(0, 2**40), max_size=8))
    order = draw(st.permutations(range(len(shape))))
    return Layout(draw(st.sampled_from(DTYPES)), tuple(shape), tuple(order), draw(st.booleans()))


headers = st.builds(
    Header,
    st.sampled_from(Flag),
    INT64,
    st.sampled_from(Kind),
    INT64,
    st.lists(st.none() | layouts(), max_size=32).map(tuple),
    st.lists(st.floats(allow_nan=False), max_size=256).map(tuple),
    st.sampled_from(Route),
)


@given(headers)
@settings(max_examples=50, deadline=None)
def test_what_is_said_is_heard(header):
    words = encode(header)
    assert words.shape == (WORDS,)
    assert decode(words) == header


def test_facts_keep_nan_and_sign():
    nan, zero = decode(encode(Header(Flag.MESSAGE, facts=(math.nan, -0.0)))).facts
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_restored(dtype):
    tensor = (
        torch.arange(32, dtype=torch.uint8).remainder(2).view(torch.bool if dtype == torch.bool else dtype)
    )
    layout, flat = flatten(tensor)
    assert flat.data_ptr() == tensor.data_ptr()  # no copy
    assert layout.nbytes == len(flat) == 32
    assert layout.restore(flat).view(torch.uint8).equal(tensor.view(torch.uint8))


def test_no_dtype_of_torch_is_forgotten():
    """Left out are those of quantized tensors, experimental ones, and those below a byte per element."""
    known = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    left_out = {str(d).removeprefix("torch.") for d in known - set(DTYPES)}
    odd = (
        "q",
        "bcomplex",
        "bits",
        "int1",
        "int2",
        "int3",
        "int4",
        "int5",
        "int6",
        "int7",
        "uint",
        "float4",
        "float8_e8",
    )
    assert all(name.startswith(odd) for name in left_out), left_out


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last),
        lambda: torch.randn(1, 3, 1, 1).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
        lambda: torch.randn(()),
        lambda: torch.empty(0, 3),
    ],
)
def test_dense_tensors_keep_their_order_in_memory(make):
    tensor = make()
    layout, flat = flatten(tensor)
    assert flat.data_ptr() == tensor.data_ptr()
    back = layout.restore(flat)
    assert back.equal(tensor)
    assert tensor.numel() == 0 or back.stride() == tensor.stride()


def test_other_tensors_are_copied():
    for tensor in (
        torch.randn(6, 8)[::2, ::3],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(3, dtype=torch.cfloat).conj(),
    ):
        layout, flat = flatten(tensor)
        assert layout.restore(flat).equal(tensor.resolve_conj())


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (Header(Flag.MESSAGE, layouts=(None,) * 33), "up to 32 tensors, got 33"),
        (Header(Flag.MESSAGE, facts=(0.0,) * 257), "up to 256 facts, got 257"),
        (Header(Flag.MESSAGE, step=2**63), "a step of 64 bits with sign, got 9223372036854775808"),
        (Header(Flag.MESSAGE, fingerprint=2**64), "a fingerprint of 64 bits with sign, got 1844"),
    ],
)
def test_what_does_not_fit_is_refused(header, says):
    with pytest.raises(StageError, match=says):
        encode(header)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros([1] * 9), "up to 8 dimensions, got 9"),
        (torch.nested.nested_tensor([torch.ones(2)]), "dense tensors, got one with layout nested"),
        (torch.eye(2).to_sparse(), "dense tensors, got one with layout torch.sparse_coo"),
        (torch.empty(2, dtype=torch.bits8), "dtype torch.bits8"),
    ],
)
def test_what_cannot_travel_is_refused(tensor, says):
    with pytest.raises(StageError, match=says):
        flatten(tensor)


def test_another_version_is_refused():
    with pytest.raises(StageError, match=rf"Expected the header \({WORDS} words .*same version"):
        decode(torch.zeros(WORDS, dtype=torch.int64))
