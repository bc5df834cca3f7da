"""What is said about a message before its tensors come: a vector of fixed length, always on the CPU."""

from array import array
from collections.abc import Sequence
from enum import IntEnum
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dni.errors import StageError
from lightning_dni.pipeline.message import Kind

MAX_TENSORS = 32
MAX_DIMS = 8
MAX_FACTS = 256

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)

_FORMAT = 0x444E4901
_HEAD = 8
_PER_TENSOR = 4 + MAX_DIMS
_FACTS_AT = _HEAD + MAX_TENSORS * _PER_TENSOR
WORDS = _FACTS_AT + MAX_FACTS
"""Length of a header."""

_INT64 = range(-(2**63), 2**63)
_MISSING = -1


class Flag(IntEnum):
    """What follows a header."""

    MESSAGE = 0
    END = 1
    FAILED = 2


class Route(IntEnum):
    """Where the tensors of a message are received.

    Buffers are posted ahead for tensors as large as those before. Tensors of other sizes go past them; if
    such sizes come twice in a row, the next buffers are posted for them.
    """

    PAST = 0
    POSTED = 1
    ADAPTED = 2


class Layout(NamedTuple):
    """How one tensor is laid out.

    Attributes:
        dtype: Of its elements.
        shape: As the user sees it.
        order: Its dimensions from the outermost to the innermost in memory, so that `channels_last` and
            transposed tensors arrive as they were.
        on_host: Whether it is on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    on_host: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return prod(self.shape) * self.dtype.itemsize

    def restore(self, flat: Tensor) -> Tensor:
        """The tensor whose bytes came."""
        there = flat.view(self.dtype).view([self.shape[d] for d in self.order])
        return there.permute([self.order.index(d) for d in range(len(self.order))])


class Header(NamedTuple):
    """What is known of a message before its tensors are there."""

    flag: Flag
    step: int = 0
    kind: Kind = Kind.TRAIN
    fingerprint: int = 0
    layouts: tuple[Layout | None, ...] = ()
    facts: tuple[float, ...] = ()
    route: Route = Route.PAST


def flatten(tensor: Tensor) -> tuple[Layout, Tensor]:
    """A tensor's layout and its bytes in the order of memory; copied only if they do not lie densely.

    Raises:
        StageError: This kind of tensor cannot travel.
    """
    odd = tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized
    if odd or tensor.dtype not in DTYPES:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise StageError(
            f"A message takes dense tensors, got one with layout {kind} and dtype {tensor.dtype}. "
            "Convert it before the boundary, e.g. by to_dense()."
        )
    if tensor.dim() > MAX_DIMS:
        raise StageError(
            f"A message takes tensors with up to {MAX_DIMS} dimensions, got {tensor.dim()}: "
            f"{tuple(tensor.shape)}. Flatten some of them before the boundary."
        )
    plain = tensor.detach().resolve_conj().resolve_neg()
    order = tuple(sorted(range(plain.dim()), key=plain.stride, reverse=True))
    dense = plain.permute(order)
    if not dense.is_contiguous():
        order = tuple(range(plain.dim()))
        dense = plain.contiguous()
    layout = Layout(plain.dtype, tuple(plain.shape), order, plain.device.type == "cpu")
    return layout, dense.reshape(-1).view(torch.uint8)


def encode(header: Header) -> Tensor:
    """A header as a vector of `WORDS` integers.

    Raises:
        StageError: It does not fit.
    """
    _check_limit("tensors", len(header.layouts), MAX_TENSORS)
    _check_limit("facts", len(header.facts), MAX_FACTS)
    for name, number in (("step", header.step), ("fingerprint", header.fingerprint)):
        if number not in _INT64:
            raise StageError(f"A message takes a {name} of 64 bits with sign, got {number}. Reduce it.")
    words = [_FORMAT, header.flag, header.step, header.kind, header.fingerprint]
    words += [len(header.layouts), len(header.facts), header.route]
    for layout in header.layouts:
        words += _words_of(layout)
    words += [0] * (_FACTS_AT - len(words))
    facts = array("d", [*header.facts, *[0.0] * (MAX_FACTS - len(header.facts))])
    return torch.frombuffer(bytearray(array("q", words).tobytes() + facts.tobytes()), dtype=torch.int64)


def decode(words: Tensor) -> Header:
    """The header that came.

    Raises:
        StageError: The vector is no header of this version.
    """
    found = words.tolist()
    if len(found) != WORDS or found[0] != _FORMAT:
        raise StageError(
            f"Expected the header ({WORDS} words that start with {_FORMAT:#x}), got {len(found)} "
            f"that start with {found[0]:#x}. Use the same version of lightning_dni in every process."
        )
    flag, step, kind, fingerprint, tensors, facts, route = found[1:_HEAD]
    starts = range(_HEAD, _HEAD + tensors * _PER_TENSOR, _PER_TENSOR)
    return Header(
        Flag(flag),
        step,
        Kind(kind),
        fingerprint,
        tuple(_layout_of(found[start : start + _PER_TENSOR]) for start in starts),
        tuple(words[_FACTS_AT : _FACTS_AT + facts].view(torch.float64).tolist()),
        Route(route),
    )


def _check_limit(what: str, number: int, limit: int) -> None:
    if number > limit:
        raise StageError(f"A message takes up to {limit} {what}, got {number}. Join some of them.")


def _words_of(layout: Layout | None) -> list[int]:
    if layout is None:
        return [_MISSING] + [0] * (_PER_TENSOR - 1)
    order = sum(dim << 4 * place for place, dim in enumerate(layout.order))
    dims = [*layout.shape, *[0] * (MAX_DIMS - len(layout.shape))]
    return [DTYPES.index(layout.dtype), len(layout.shape), order, layout.on_host, *dims]


def _layout_of(words: Sequence[int]) -> Layout | None:
    code, ndim, order, on_host, *dims = words
    if code == _MISSING:
        return None
    places = tuple(order >> 4 * place & 0xF for place in range(ndim))
    return Layout(DTYPES[code], tuple(dims[:ndim]), places, bool(on_host))
