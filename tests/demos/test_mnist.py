"""MNIST is read exactly, split by its own seed, and downloaded where it is absent."""

import gzip
import hashlib
import re
import shutil

import lightning.pytorch as pl
import pytest
import torch

from lightning_dni.demos import MLPClassifier, MNISTDataModule
from lightning_dni.demos.mnist import CHECKSUMS, MIRRORS

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = CHECKSUMS


def mnist(data_dir, val_size=10, **options):
    datamodule = MNISTDataModule(data_dir, val_size=val_size, download=False, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def test_images_are_scaled_floats_in_the_order_of_the_file(small_mnist):
    train, val, test = mnist(small_mnist).splits
    expected = (torch.arange(40) / 255).reshape(40, 1, 1, 1).expand(40, 1, 28, 28)
    assert train.inputs.dtype == torch.float32
    assert train.inputs.equal(expected)
    assert train.targets.equal(torch.arange(40) % 10)
    assert test.inputs.equal(expected[:20])
    assert test.rows.equal(torch.arange(20))
    assert val.inputs is train.inputs


def test_archives_and_raw_files_read_alike(small_mnist, small_archives):
    (small_archives / f"{TEST_LABELS}.gz").unlink()
    shutil.copy(small_mnist / TEST_LABELS, small_archives)
    for raw, mixed in zip(mnist(small_mnist).splits, mnist(small_archives).splits, strict=True):
        assert raw.inputs.equal(mixed.inputs)
        assert raw.targets.equal(mixed.targets)
        assert raw.rows.equal(mixed.rows)


@pytest.mark.parametrize("val_size", [0, 10, 39])
def test_validation_and_training_share_out_the_training_file(small_mnist, val_size):
    train, val, _ = mnist(small_mnist, val_size=val_size).splits
    assert len(val) == val_size
    assert torch.cat([train.rows, val.rows]).sort().values.equal(torch.arange(40))


def test_num_train_takes_a_random_subset_and_leaves_validation_alone(small_mnist):
    whole = mnist(small_mnist).splits
    small, smaller = (mnist(small_mnist, num_train=size).splits for size in (20, 5))
    assert len(smaller.train) == 5
    rows = [set(splits.train.rows.tolist()) for splits in (smaller, small, whole)]
    assert rows[0] < rows[1] < rows[2]
    assert rows[0] != set(range(5))
    assert small.val.rows.equal(whole.val.rows)


def test_same_seed_same_split_and_other_seed_another(small_mnist):
    first, second, other = (mnist(small_mnist, seed=seed).splits for seed in (3, 3, 4))
    assert first.val.rows.equal(second.val.rows)
    assert not first.val.rows.equal(other.val.rows)


def test_split_neither_reads_nor_moves_the_global_generator(small_mnist):
    torch.manual_seed(1)
    first = mnist(small_mnist).splits
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = mnist(small_mnist).splits
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
        MNISTDataModule(**options)


def test_validation_that_leaves_nothing_is_refused(small_mnist):
    with pytest.raises(ValueError, match=r"`val_size` to be less than the 40 rows .* got 40"):
        mnist(small_mnist, val_size=40)


def test_more_training_rows_than_there_are_is_refused(small_mnist):
    with pytest.raises(ValueError, match=r"`num_train` to be at most 30, .* but got 31"):
        mnist(small_mnist, num_train=31)


@pytest.mark.parametrize("name", CHECKSUMS)
def test_absent_file_is_named(small_mnist, name):
    (small_mnist / name).unlink()
    message = f"Expected `data_dir` to hold `{name}` or `{name}.gz`, but `{small_mnist}` has"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        mnist(small_mnist)


def test_labels_that_do_not_match_the_images_are_refused(small_mnist):
    shutil.copy(small_mnist / TEST_LABELS, small_mnist / TRAIN_LABELS)
    message = f"Expected `{small_mnist / TRAIN_LABELS}` to hold 40 labels, one per image of"
    with pytest.raises(ValueError, match=rf"{re.escape(message)}.* but got 20\."):
        mnist(small_mnist)


def test_label_of_no_digit_is_refused(small_mnist, write_idx):
    path = write_idx(small_mnist / TEST_LABELS, (20,), bytes(19) + b"\x0a")
    message = f"Expected `{path}` to hold labels from 0 to 9, but got 10."
    with pytest.raises(ValueError, match=re.escape(message)):
        mnist(small_mnist)


def test_damaged_archive_is_named(small_archives):
    path = small_archives / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    message = f"Expected `{path}` to be a whole gzip file"
    with pytest.raises(ValueError, match=re.escape(message)):
        mnist(small_archives)


def test_absent_files_are_downloaded_and_the_others_left(
    small_mnist, small_archives, small_checksums, serve, dead_mirror
):
    for name in (TRAIN_IMAGES, TEST_LABELS):
        (small_mnist / name).unlink()
    datamodule = MNISTDataModule(
        small_mnist,
        val_size=10,
        mirrors=[dead_mirror, serve(small_archives)],
        checksums=small_checksums,
    )
    datamodule.prepare_data()
    assert {path.name for path in small_mnist.iterdir()} == {
        f"{TRAIN_IMAGES}.gz",
        TRAIN_LABELS,
        TEST_IMAGES,
        f"{TEST_LABELS}.gz",
    }
    datamodule.setup("fit")
    assert len(datamodule.splits.train) == 30


def test_second_preparation_needs_no_mirror(small_archives, small_checksums, dead_mirror):
    MNISTDataModule(small_archives, mirrors=[dead_mirror], checksums=small_checksums).prepare_data()


def test_file_that_is_not_mnist_is_not_kept(small_archives, serve, tmp_path):
    """The small archives under the real checksums: what a tampered mirror looks like."""
    datamodule = MNISTDataModule(tmp_path / "data", mirrors=[serve(small_archives)])
    message = f"{TRAIN_IMAGES}.gz.* known hash: expected sha256:{CHECKSUMS[TRAIN_IMAGES]} but got"
    with pytest.raises(ConnectionError, match=message):
        datamodule.prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_dead_mirrors_are_listed(tmp_path, dead_mirror):
    datamodule = MNISTDataModule(tmp_path / "data", mirrors=[dead_mirror])
    with pytest.raises(ConnectionError, match=re.escape(f"{dead_mirror}{TRAIN_IMAGES}.gz")):
        datamodule.prepare_data()


def test_known_mirrors_and_checksums_are_well_formed():
    assert all(re.fullmatch(r"https://.*/mnist/", mirror) for mirror in MIRRORS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in CHECKSUMS.values())
    assert len(set(CHECKSUMS.values())) == 4


@pytest.fixture(scope="module")
def real(real_mnist):
    return mnist(real_mnist, val_size=5000, num_train=10000)


def test_real_files_hold_mnist(real):
    train, val, test = real.splits
    assert [len(split) for split in (train, val, test)] == [10000, 5000, 10000]
    assert train.inputs.shape == (60000, 1, 28, 28)
    assert (train.inputs.min(), train.inputs.max()) == (0.0, 1.0)
    assert float(train.inputs.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(train.inputs.std()) == pytest.approx(0.3081, abs=1e-4)
    assert train.targets[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert test.targets[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.targets.bincount().tolist() == counts


def test_one_epoch_on_real_files_teaches_most_digits(real):
    model = MLPClassifier(input_size=784, num_hidden=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=real)
    assert trainer.callback_metrics["val_accuracy"] > 0.9


def test_real_files_pass_through_a_mirror(real_mnist, serve, tmp_path):
    for name in (TEST_IMAGES, TEST_LABELS):
        if not (real_mnist / f"{name}.gz").exists():
            pytest.skip(f"no archive of {name} in {real_mnist}")
    digest = hashlib.sha256((real_mnist / f"{TEST_LABELS}.gz").read_bytes()).hexdigest()
    MNISTDataModule(
        tmp_path / "data", mirrors=[serve(real_mnist)], checksums={TEST_LABELS: digest}
    ).prepare_data()
    content = gzip.decompress((tmp_path / "data" / f"{TEST_LABELS}.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest().startswith("ff7bcfd416de3373")
