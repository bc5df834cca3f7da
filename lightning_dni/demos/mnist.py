"""MNIST, from four IDX files that are downloaded where they are absent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import override

from lightning_dni.demos.arguments import check_count
from lightning_dni.demos.idx import read_idx
from lightning_dni.demos.mirror import fetch
from lightning_dni.demos.splits import AbstractInMemoryDataModule, Split, Splits, shuffle_rows

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# of the .gz archives as the mirrors serve them; a repacked archive has another
CHECKSUMS = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
NUM_CLASSES = 10


class MNISTDataModule(AbstractInMemoryDataModule):
    """MNIST in [0, 1], shaped (1, 28, 28), validated on rows of the training file.

    Files found in `data_dir`, raw or gzipped, are read as they are: their form is checked, their
    checksum only when they are downloaded.

    Args:
        data_dir: folder of the four files.
        batch_size: rows per batch.
        num_train: train on a fixed random subset of this size; `None` takes all.
        val_size: rows of the training file that validate; 0 for none.
        seed: of the split; the global generators are neither read nor moved by it.
        num_workers: processes that read batches.
        download: whether files that are absent are downloaded.
        mirrors: addresses of folders that serve the files, tried in order.
        checksums: sha256 of the `.gz` archive of each file, keyed without the suffix.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        data_dir: str | Path = "data/mnist",
        batch_size: int = 256,
        num_train: int | None = None,
        val_size: int = 5000,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = True,
        mirrors: Sequence[str] = MIRRORS,
        checksums: Mapping[str, str] = CHECKSUMS,
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
        self.checksums = checksums

    @override
    def prepare_data(self) -> None:
        """Download the files that are absent, if allowed."""
        for name, sha256 in self.checksums.items():
            if self.download and _find(self.data_dir, name) is None:
                fetch(f"{name}.gz", sha256, self.mirrors, self.data_dir)

    @override
    def load(self) -> Splits:
        """Read and split the files."""
        images, labels = read_pair(self.data_dir, "train")
        train, val = shuffle_rows(len(labels), self.val_size, self.num_train, self.seed)
        test_images, test_labels = read_pair(self.data_dir, "t10k")
        return Splits(
            Split(images, labels, train),
            Split(images, labels, val),
            Split(test_images, test_labels, torch.arange(len(test_labels))),
        )


def read_pair(data_dir: Path, prefix: str) -> tuple[Float[Tensor, " size 1 28 28"], Int64[Tensor, " size"]]:
    """Read the images and labels of one of the two sets.

    Args:
        data_dir: folder of the files.
        prefix: `"train"` or `"t10k"`, as the files are named.

    Returns:
        Images in [0, 1] and their labels.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is corrupt, or the two do not belong together.
    """
    images_path = _require(data_dir, f"{prefix}-images-idx3-ubyte")
    labels_path = _require(data_dir, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, (28, 28))
    labels = read_idx(labels_path, ())
    if len(images) != len(labels):
        raise ValueError(
            f"Expected `{labels_path}` to hold {len(images)} labels, one per image of "
            f"`{images_path}`, but got {len(labels)}."
        )
    highest = int(labels.max())
    if highest >= NUM_CLASSES:
        raise ValueError(
            f"Expected `{labels_path}` to hold labels from 0 to {NUM_CLASSES - 1}, but got {highest}."
        )
    return images.unsqueeze(1).float().div_(255), labels.long()


def _find(data_dir: Path, name: str) -> Path | None:
    candidates = (data_dir / name, data_dir / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _require(data_dir: Path, name: str) -> Path:
    path = _find(data_dir, name)
    if path is None:
        raise FileNotFoundError(
            f"Expected `data_dir` to hold `{name}` or `{name}.gz`, but `{data_dir}` has neither. "
            f"Put the four MNIST files there, or let `prepare_data()` fetch them with "
            f"`download=True`."
        )
    return path
