"""A good IDX file is read exactly, a bad one is refused by name."""

import gzip
import re

import pytest
import torch

from lightning_dni.demos.idx import read_idx


def refused(path, text):
    return pytest.raises(ValueError, match=re.escape(f"Expected `{path}` to {text}"))


@pytest.fixture
def labels(tmp_path, write_idx):
    return write_idx(tmp_path / "labels", (3,), bytes([7, 0, 255]))


@pytest.fixture
def archive(tmp_path, labels):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(labels.read_bytes()))
    return path


def test_labels_are_read(labels):
    read = read_idx(labels, ())
    assert read.dtype == torch.uint8
    assert read.tolist() == [7, 0, 255]


def test_archive_reads_as_its_content(archive, labels):
    assert read_idx(archive, ()).equal(read_idx(labels, ()))


def test_images_are_read_in_row_major_order(tmp_path, write_idx):
    path = write_idx(tmp_path / "images", (2, 2, 3), bytes(range(12)))
    assert read_idx(path, (2, 3)).equal(torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3))


def test_what_was_read_is_writable_and_leaves_the_file_alone(labels):
    read_idx(labels, ()).zero_()
    assert read_idx(labels, ()).tolist() == [7, 0, 255]


@pytest.mark.parametrize(
    ("start", "got"),
    [
        (b"\x01\x00\x08\x01", "01 00 08 01"),
        (b"\x00\x00\x0d\x01", "00 00 0d 01"),
        (b"\x00\x00\x08\x03", "00 00 08 03"),
        (b"\x1f\x8b\x08\x00", "1f 8b 08 00"),
    ],
    ids=["magic", "type code", "number of dimensions", "gzip under a raw name"],
)
def test_other_start_is_refused(labels, start, got):
    labels.write_bytes(start + labels.read_bytes()[4:])
    expected = "start with the bytes 00 00 08 01 (IDX, unsigned byte, 1 dimensions)"
    with refused(labels, f"{expected}, but got {got}."):
        read_idx(labels, ())


def test_empty_file_is_refused(labels):
    labels.write_bytes(b"")
    with pytest.raises(ValueError, match=r"to start with .* but got an empty file\. Replace"):
        read_idx(labels, ())


def test_truncated_header_is_refused(labels):
    labels.write_bytes(labels.read_bytes()[:6])
    with refused(labels, "have a header of 8 bytes, but got a file of 6. Replace"):
        read_idx(labels, ())


@pytest.mark.parametrize(("change", "length"), [(lambda d: d[:-1], 10), (lambda d: d + b"!", 12)])
def test_truncation_and_trailing_bytes_are_refused(labels, change, length):
    labels.write_bytes(change(labels.read_bytes()))
    with refused(labels, f"hold 11 bytes for its shape (3,), but got {length}. Replace"):
        read_idx(labels, ())


def test_huge_count_is_refused_without_allocating_it(tmp_path, write_idx):
    path = write_idx(tmp_path / "labels", (2**32 - 1,), b"\x00")
    with refused(path, "hold 4294967303 bytes for its shape (4294967295,), but got 9."):
        read_idx(path, ())


def test_other_item_shape_is_refused(tmp_path, write_idx):
    path = write_idx(tmp_path / "images", (2, 3, 2), bytes(12))
    with refused(path, "hold one or more items of shape (2, 3), but got 2 of shape (3, 2)."):
        read_idx(path, (2, 3))


def test_no_items_are_refused(tmp_path, write_idx):
    path = write_idx(tmp_path / "labels", (0,), b"")
    with refused(path, "hold one or more items of shape (), but got 0 of shape ()."):
        read_idx(path, ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: b"no gzip at all", "Not a gzipped file"),
        (lambda d: d[:-10], "Compressed file ended"),
        (lambda d: d[:-8] + b"\x00\x00\x00\x00" + d[-4:], "CRC check failed"),
        (lambda d: d[:10] + b"\xff" * (len(d) - 10), "Error -3 while decompressing"),
        (lambda d: d + b"trailing", "Not a gzipped file"),
    ],
    ids=["no gzip", "truncated", "checksum", "garbage", "trailing bytes"],
)
def test_broken_archive_is_refused(archive, change, reason):
    archive.write_bytes(change(archive.read_bytes()))
    with refused(archive, f"be a whole gzip file, but got: {reason}"):
        read_idx(archive, ())


def test_empty_archive_is_refused(archive):
    archive.write_bytes(b"")
    with pytest.raises(ValueError, match="but got an empty file"):
        read_idx(archive, ())
