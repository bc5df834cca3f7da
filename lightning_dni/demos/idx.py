"""Read unsigned bytes from a file in the IDX format, raw or gzipped."""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, item_shape: tuple[int, ...]) -> UInt8[Tensor, " items *item"]:
    """Read a whole IDX file, and trust nothing in it.

    The format: two zero bytes, a type code, the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the numbers in row-major order.

    Args:
        path: the file; a name that ends in `.gz` is decompressed.
        item_shape: shape of one item, `()` for labels.

    Returns:
        All items, stacked along the first dimension.

    Raises:
        ValueError: the file is corrupt, of another type or of another shape.
    """
    data = _decompress(path) if path.suffix == ".gz" else path.read_bytes()
    offset = 4 + 4 * (1 + len(item_shape))
    shape = _parse_header(path, data[:offset], item_shape)
    if len(data) != offset + prod(shape):
        raise ValueError(
            f"Expected `{path}` to hold {offset + prod(shape)} bytes for its shape {shape}, "
            f"but got {len(data)}. {_REPLACE}"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[offset:].reshape(shape)


def _parse_header(path: Path, header: bytes, item_shape: tuple[int, ...]) -> tuple[int, ...]:
    num_dims = 1 + len(item_shape)
    expected = bytes([0, 0, UNSIGNED_BYTE, num_dims])
    if header[:4] != expected:
        raise ValueError(
            f"Expected `{path}` to start with the bytes {expected.hex(' ')} (IDX, unsigned byte, "
            f"{num_dims} dimensions), but got {header[:4].hex(' ') or 'an empty file'}. {_REPLACE}"
        )
    if len(header) < 4 + 4 * num_dims:
        raise ValueError(
            f"Expected `{path}` to have a header of {4 + 4 * num_dims} bytes, "
            f"but got a file of {len(header)}. {_REPLACE}"
        )
    shape = struct.unpack(f">{num_dims}I", header[4:])
    if shape[0] == 0 or shape[1:] != item_shape:
        raise ValueError(
            f"Expected `{path}` to hold one or more items of shape {item_shape}, "
            f"but got {shape[0]} of shape {shape[1:]}."
        )
    return shape


def _decompress(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"Expected `{path}` to be a whole gzip file, but got: {error}. {_REPLACE}"
        ) from error


_REPLACE = "Replace the file, or delete it to have it downloaded again."
