"""Read the labelled images of CIFAR-10's binary files, packed in their archive or unpacked."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

IMAGE_SHAPE = (3, 32, 32)
NUM_CLASSES = 10
_LENGTH = 1 + 3 * 32 * 32


def read_records(
    data: bytes, where: str
) -> tuple[UInt8[Tensor, " records 3 32 32"], Int64[Tensor, " records"]]:
    """Take the bytes of one file apart, and trust nothing in them.

    The format: records without anything around them, each a byte for the class, then a plane of 1,024
    bytes for red, one for green and one for blue, each row by row from the top.

    Args:
        data: the whole file.
        where: what the file is called, for the message.

    Returns:
        Images and their classes.

    Raises:
        ValueError: the bytes are no whole number of records, or a class is out of range.
    """
    if not data or len(data) % _LENGTH:
        raise ValueError(
            f"Expected {where} to hold one or more records of {_LENGTH} bytes, "
            f"but got {len(data)} bytes in all. {_REPLACE}"
        )
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, _LENGTH)
    labels = records[:, 0].long()
    highest = int(labels.max())
    if highest >= NUM_CLASSES:
        raise ValueError(
            f"Expected {where} to hold classes from 0 to {NUM_CLASSES - 1}, but got {highest}. {_REPLACE}"
        )
    return records[:, 1:].reshape(-1, *IMAGE_SHAPE), labels


def read_members(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read some files of a gzipped tar archive into memory; nothing is written, whatever it says.

    Args:
        archive: the `.tar.gz` file.
        names: of its members, with their folder.

    Returns:
        Content by name.

    Raises:
        ValueError: the archive is damaged, or a name is absent or no plain file.
    """
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                found = {
                    member.name: content.read()
                    for member in tar
                    if member.name in names and member.isreg() and (content := tar.extractfile(member))
                }
            # gzip compares its checksum at the end, behind what tar has read
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"Expected `{archive}` to be a whole tar archive in gzip format, but got: {error}. {_REPLACE}"
        ) from error
    absent = [name for name in names if name not in found]
    if absent:
        raise ValueError(
            f"Expected `{archive}` to hold `{absent[0]}` as a plain file, but it has none. {_REPLACE}"
        )
    return found


_REPLACE = "Replace the file, or delete it to have the archive downloaded again."
