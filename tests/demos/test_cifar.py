"""CIFAR-10 is read exactly, split by its own seed, and downloaded where it is absent."""

import gzip
import hashlib
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch
from made_cifar import FILES, FOLDER, TEST_FILE, TRAIN_FILES, made_files, pack, pixel, record, write_archive
from torch.testing import assert_close

from lightning_dni.demos import CIFAR10DataModule
from lightning_dni.demos.cifar import ARCHIVE, CHECKSUM, MIRRORS
from lightning_dni.demos.records import read_records

MADE = made_files()
PACKED = pack(MADE)


def images(rows):
    """What the made images are, indexed as [row, channel, y, x]."""
    row, c, y, x = (torch.arange(size) for size in (48, 3, 32, 32))
    row, c, y = row.view(-1, 1, 1, 1), c.view(-1, 1, 1), y.view(-1, 1)
    return ((37 * row + 80 * c + 7 * y + 3 * x + x * y) % 256)[rows]


def cifar(data_dir, val_size=10, **options):
    datamodule = CIFAR10DataModule(data_dir, val_size=val_size, download=False, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


@pytest.fixture
def made(tmp_path):
    """A folder that holds a made archive: 40 rows in five files, and 8 to test."""
    return write_archive(tmp_path / "made", PACKED).parent


@pytest.fixture
def unpacked(tmp_path):
    """A folder that holds the same, unpacked."""
    folder = tmp_path / "unpacked" / FOLDER
    folder.mkdir(parents=True)
    for name, data in MADE.items():
        (folder / name).write_bytes(data)
    return folder.parent


def test_a_record_is_the_class_then_planes_of_red_green_and_blue_row_by_row():
    pixels, labels = read_records(record(5, 7) + record(6, 1), "it")
    assert pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 1]
    assert pixels.long().equal(images([5, 6]))
    assert pixels[1, 2, 30, 4] == pixel(6, 2, 30, 4)


def test_images_are_less_the_mean_and_over_the_deviation_of_the_rows_that_train(made):
    train, val, test = cifar(made).splits
    pixels = images(train.rows).double()
    mean, std = pixels.mean((0, 2, 3)).view(3, 1, 1), pixels.std((0, 2, 3), correction=0).view(3, 1, 1)
    assert train.inputs.dtype == torch.float32
    assert_close(train.inputs, ((images(range(40)) - mean) / std).float(), rtol=1e-5, atol=1e-6)
    assert_close(test.inputs, ((images(range(40, 48)) - mean) / std).float(), rtol=1e-5, atol=1e-6)
    assert train.targets.tolist() == [row % 10 for row in range(40)]
    assert test.targets.tolist() == [row % 10 for row in range(40, 48)]
    assert test.rows.equal(torch.arange(8))
    assert val.inputs is train.inputs


def test_a_channel_that_does_not_vary_is_no_division_by_zero(unpacked):
    for name in FILES:
        (unpacked / FOLDER / name).write_bytes(bytes([3]) + 1024 * b"\x09" + 2048 * b"\x00")
    assert cifar(unpacked, val_size=1).splits.train.inputs.eq(0).all()


def test_the_archive_and_what_is_in_it_read_alike(made, unpacked):
    for one, other in zip(cifar(made).splits, cifar(unpacked).splits, strict=True):
        assert one.inputs.equal(other.inputs)
        assert one.targets.equal(other.targets)
        assert one.rows.equal(other.rows)


@pytest.mark.parametrize("val_size", [0, 10, 39])
def test_validation_and_training_share_out_the_training_files(made, val_size):
    train, val, _ = cifar(made, val_size=val_size).splits
    assert len(val) == val_size
    assert torch.cat([train.rows, val.rows]).sort().values.equal(torch.arange(40))


def test_same_seed_same_split_and_other_seed_another(made):
    first, second, other = (cifar(made, seed=seed).splits for seed in (3, 3, 4))
    assert first.val.rows.equal(second.val.rows)
    assert not first.val.rows.equal(other.val.rows)


def test_num_train_takes_fewer_rows_and_leaves_validation_alone(made):
    whole, small = cifar(made).splits, cifar(made, num_train=5).splits
    assert len(small.train) == 5
    assert set(small.train.rows.tolist()) < set(whole.train.rows.tolist())
    assert small.val.rows.equal(whole.val.rows)


def test_the_split_neither_reads_nor_moves_the_global_generator(made):
    torch.manual_seed(1)
    first = cifar(made).splits
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = cifar(made).splits
    assert torch.get_rng_state().equal(state)
    assert first.train.rows.equal(second.train.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "`num_train` to be an integer of at least 1, but got 0"),
        ({"val_size": -1}, "`val_size` to be an integer of at least 0, but got -1"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` to be an integer of at least 0, but got -1"),
    ],
)
def test_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**options)


def test_more_rows_than_there_are_are_refused(made):
    with pytest.raises(ValueError, match=r"`val_size` to be less than the 40 rows .* got 40"):
        cifar(made, val_size=40)
    with pytest.raises(ValueError, match=r"`num_train` to be at most 30, .* but got 31"):
        cifar(made, num_train=31)


@pytest.mark.parametrize("name", FILES)
def test_absent_member_is_named(made, name):
    path = write_archive(made, pack({key: data for key, data in MADE.items() if key != name}))
    message = f"Expected `{path}` to hold `{FOLDER}/{name}` as a plain file, but it has none. Replace"
    with pytest.raises(ValueError, match=re.escape(message)):
        cifar(made)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_a_link_or_a_folder_is_no_file(made, kind):
    member = tarfile.TarInfo(f"{FOLDER}/{TEST_FILE}")
    member.type, member.linkname = kind, f"{FOLDER}/{TRAIN_FILES[0]}"
    files = {name: MADE[name] for name in TRAIN_FILES}
    write_archive(made, pack(files, member))
    with pytest.raises(ValueError, match=re.escape(f"`{FOLDER}/{TEST_FILE}` as a plain file")):
        cifar(made)


def test_no_member_is_written_anywhere(made, tmp_path):
    others = [tarfile.TarInfo(name) for name in ("../evil", f"{tmp_path}/evil", f"{FOLDER}/../../evil")]
    for member in others:
        member.size = 5
    write_archive(made, pack(MADE, *others))
    assert len(cifar(made).splits.train) == 30
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [made / ARCHIVE]


@pytest.mark.parametrize("kept", [0, 5, 500, len(PACKED) // 2, len(PACKED) - 9, len(PACKED) - 1])
def test_truncated_archive_is_named(made, kept):
    write_archive(made, PACKED[:kept])
    with pytest.raises(ValueError, match=re.escape(f"Expected `{made / ARCHIVE}` to be a whole tar archive")):
        cifar(made)


def test_one_wrong_bit_is_found_by_the_checksum_that_gzip_has(made):
    data = bytearray(gzip.compress(gzip.decompress(PACKED), compresslevel=0))
    data[20_000] ^= 1
    write_archive(made, bytes(data))
    with pytest.raises(ValueError, match="whole tar archive in gzip format, but got: CRC check failed"):
        cifar(made)


@pytest.mark.parametrize("data", [b"an error page", gzip.compress(b"no tar archive")], ids=["page", "gzip"])
def test_what_is_no_archive_is_named(made, data):
    write_archive(made, data)
    with pytest.raises(ValueError, match=re.escape(f"Expected `{made / ARCHIVE}` to be a whole tar archive")):
        cifar(made)


@pytest.mark.parametrize("data", [b"", MADE[TRAIN_FILES[2]][:-1], MADE[TRAIN_FILES[2]] + b"\0"])
def test_file_that_is_no_whole_number_of_records_is_named(made, unpacked, data):
    name = TRAIN_FILES[2]
    (unpacked / FOLDER / name).write_bytes(data)
    said = f"to hold one or more records of 3073 bytes, but got {len(data)} bytes in all. Replace the file"
    with pytest.raises(ValueError, match=re.escape(f"Expected `{unpacked / FOLDER / name}` {said}")):
        cifar(unpacked)
    path = write_archive(made, pack({**MADE, name: data}))
    with pytest.raises(ValueError, match=re.escape(f"Expected `{FOLDER}/{name}` in `{path}` {said}")):
        cifar(made)


def test_class_out_of_range_is_refused(unpacked):
    path = unpacked / FOLDER / TEST_FILE
    path.write_bytes(record(0, 9) + record(1, 10))
    with pytest.raises(
        ValueError, match=re.escape(f"Expected `{path}` to hold classes from 0 to 9, but got 10")
    ):
        cifar(unpacked)


def test_absent_data_says_what_is_wanted_where(unpacked):
    (unpacked / FOLDER / TEST_FILE).unlink()
    message = (
        f"Expected `data_dir` to hold `{ARCHIVE}`, or `{FOLDER}` with {', '.join(TRAIN_FILES)}, {TEST_FILE}"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)) as caught:
        cifar(unpacked)
    assert f"`{unpacked}` has neither. Put the archive there, or let `prepare_data()`" in str(caught.value)


def test_absent_archive_is_downloaded_and_then_no_mirror_is_needed(made, serve, dead_mirror, tmp_path):
    digest = hashlib.sha256(PACKED).hexdigest()
    options = {"data_dir": tmp_path / "new" / "data", "val_size": 10, "checksum": digest}
    CIFAR10DataModule(mirrors=[dead_mirror, serve(made)], **options).prepare_data()
    assert (tmp_path / "new/data" / ARCHIVE).read_bytes() == PACKED
    again = CIFAR10DataModule(mirrors=[dead_mirror], **options)
    again.prepare_data()
    again.setup("fit")
    assert len(again.splits.train) == 30


@pytest.mark.parametrize("held", ["made", "unpacked"])
def test_what_lies_there_is_not_downloaded(request, held, dead_mirror):
    folder = request.getfixturevalue(held)
    datamodule = CIFAR10DataModule(folder, val_size=10, mirrors=[dead_mirror])
    datamodule.prepare_data()
    datamodule.setup("fit")
    assert len(datamodule.splits.train) == 30


def test_archive_that_is_not_cifar_is_not_kept(made, serve, tmp_path):
    """The made archive under the real checksum: what a tampered mirror looks like."""
    datamodule = CIFAR10DataModule(tmp_path / "data", mirrors=[serve(made)])
    with pytest.raises(ConnectionError, match=f"{ARCHIVE}.* known hash: expected sha256:{CHECKSUM} but got"):
        datamodule.prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_offline_says_what_was_tried_and_what_to_do(dead_mirror, tmp_path):
    datamodule = CIFAR10DataModule(tmp_path / "data", mirrors=[dead_mirror])
    with pytest.raises(ConnectionError, match=re.escape(f"{dead_mirror}{ARCHIVE}: ")) as caught:
        datamodule.prepare_data()
    assert f"Expected `{ARCHIVE}` in `data_dir`, or a mirror that serves it" in str(caught.value)
    assert f"Put the file into `{tmp_path / 'data'}` by hand" in str(caught.value)


def test_known_mirror_and_checksum_are_well_formed():
    assert all(re.fullmatch(r"https://.*/", mirror) for mirror in MIRRORS)
    assert re.fullmatch(r"[0-9a-f]{64}", CHECKSUM)


def test_real_archive_holds_cifar():
    folder = Path(os.environ.get("LIGHTNING_DNI_CIFAR", "nowhere"))
    if not (folder / ARCHIVE).exists():
        pytest.skip(f"no {ARCHIVE}: set LIGHTNING_DNI_CIFAR to a folder that has it")
    assert hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest() == CHECKSUM
    train, _, test = cifar(folder, val_size=0).splits
    assert train.targets.bincount().tolist() == 10 * [5000]
    assert test.targets.bincount().tolist() == 10 * [1000]
    assert train.targets[:5].tolist() == [6, 9, 9, 4, 1]
    assert test.targets[:5].tolist() == [3, 8, 8, 0, 6]
