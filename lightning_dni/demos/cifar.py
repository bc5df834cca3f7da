"""CIFAR-10 in its binary version, from one archive that is downloaded where it is absent."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from typing_extensions import override

from lightning_dni.demos.arguments import check_count
from lightning_dni.demos.mirror import fetch
from lightning_dni.demos.records import read_members, read_records
from lightning_dni.demos.splits import AbstractInMemoryDataModule, Split, Splits, shuffle_rows

MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)
ARCHIVE = "cifar-10-binary.tar.gz"
# of the archive as its authors serve it, whose page gives the MD5 c32a1d4ab5d03f1284b67883e8d87530
CHECKSUM = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"


class CIFAR10DataModule(AbstractInMemoryDataModule):
    """CIFAR-10, shaped (3, 32, 32), validated on rows of the five training files.

    From each channel its mean is taken, and it is divided by its standard deviation; both are those of the
    rows that train. Classes are 0 airplane, 1 automobile, 2 bird, 3 cat, 4 deer, 5 dog, 6 frog, 7 horse,
    8 ship, 9 truck.

    What is found in `data_dir`, the archive or the folder that is in it, is read as it is: its form is
    checked, its checksum only when it is downloaded. The archive is read in memory, not unpacked.

    Args:
        data_dir: folder of the archive, or of the folder that is in it.
        batch_size: rows per batch.
        num_train: train on a fixed random subset of this size; `None` takes all.
        val_size: rows of the training files that validate; 0 for none.
        seed: of the split; the global generators are neither read nor moved by it.
        num_workers: processes that read batches.
        download: whether the archive is downloaded where it is absent.
        mirrors: addresses of folders that serve the archive, tried in order.
        checksum: sha256 of the archive.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        data_dir: str | Path = "data/cifar10",
        batch_size: int = 256,
        num_train: int | None = None,
        val_size: int = 5000,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = True,
        mirrors: Sequence[str] = MIRRORS,
        checksum: str = CHECKSUM,
    ) -> None:
        if num_train is not None:
            check_count("num_train", num_train)
        check_count("val_size", val_size, minimum=0)
        check_count("seed", seed, minimum=0)
        super().__init__(batch_size, num_workers)
        self.data_dir = Path(data_dir)
        self.num_train = num_train
        self.val_size = val_size
        self.seed = seed
        self.download = download
        self.mirrors = mirrors
        self.checksum = checksum

    @override
    def prepare_data(self) -> None:
        """Download the archive, if it is absent and that is allowed."""
        if self.download and _find(self.data_dir) is None:
            fetch(ARCHIVE, self.checksum, self.mirrors, self.data_dir)

    @override
    def load(self) -> Splits:
        """Read, split and normalize the images."""
        *train_files, (test_pixels, test_labels) = [
            read_records(data, where) for where, data in _contents(self.data_dir)
        ]
        pixels = torch.cat([part for part, _ in train_files])
        labels = torch.cat([part for _, part in train_files])
        train, val = shuffle_rows(len(labels), self.val_size, self.num_train, self.seed)
        mean, std = channel_statistics(pixels[train])
        images = pixels.float().sub_(mean).div_(std)
        return Splits(
            Split(images, labels, train),
            Split(images, labels, val),
            Split(test_pixels.float().sub_(mean).div_(std), test_labels, torch.arange(len(test_labels))),
        )


def channel_statistics(
    pixels: UInt8[Tensor, " rows channels height width"],
) -> tuple[Float[Tensor, " channels 1 1"], Float[Tensor, " channels 1 1"]]:
    """Mean and standard deviation of each channel, from exact counts; 1 where a channel does not vary.

    Example:
        >>> mean, std = channel_statistics(torch.tensor([0, 2, 7, 7], dtype=torch.uint8).view(1, 2, 1, 2))
        >>> mean.flatten().tolist(), std.flatten().tolist()
        ([1.0, 7.0], [1.0, 1.0])
    """
    channels = pixels.transpose(0, 1)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels]).double()
    shares, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
    mean = (shares * levels).sum(1, keepdim=True)
    std = (shares * (levels - mean) ** 2).sum(1, keepdim=True).sqrt()
    std = torch.where(std > 0, std, 1.0)
    return mean.float().unsqueeze(2), std.float().unsqueeze(2)


def _find(data_dir: Path) -> Path | None:
    folder, archive = data_dir / FOLDER, data_dir / ARCHIVE
    if all((folder / name).is_file() for name in (*TRAIN_FILES, TEST_FILE)):
        return folder
    return archive if archive.is_file() else None


def _contents(data_dir: Path) -> list[tuple[str, bytes]]:
    """What each file is called in messages, and its bytes; the test file comes last."""
    source, names = _find(data_dir), (*TRAIN_FILES, TEST_FILE)
    if source is None:
        raise FileNotFoundError(
            f"Expected `data_dir` to hold `{ARCHIVE}`, or `{FOLDER}` with {', '.join(names)} in it, but "
            f"`{data_dir}` has neither. Put the archive there, or let `prepare_data()` fetch it with "
            f"`download=True`."
        )
    if source.is_dir():
        return [(f"`{source / name}`", (source / name).read_bytes()) for name in names]
    members = read_members(source, [f"{FOLDER}/{name}" for name in names])
    return [(f"`{FOLDER}/{name}` in `{source}`", members[f"{FOLDER}/{name}"]) for name in names]
