"""Serve fixed train, validation and test splits that are held in memory."""

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_dni.demos.arguments import check_count

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")


class Split(Dataset[Batch]):
    """Some rows of a pair of tensors, read without copying the others.

    Args:
        inputs: what goes into the network, possibly shared by several splits.
        targets: the class of each input, or of each position of it.
        rows: which rows belong to this split.
    """

    def __init__(
        self,
        inputs: Shaped[Tensor, " all *dims"],
        targets: Int64[Tensor, " all *positions"],
        rows: Int64[Tensor, " size"],
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index]
        return self.inputs[row], self.targets[row]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Read a whole batch by one tensor indexing; `DataLoader` prefers it to `__getitem__`."""
        rows = self.rows[torch.tensor(indices, dtype=torch.int64)]
        return self.inputs[rows], self.targets[rows]


class Splits(NamedTuple):
    """The three splits of a data set."""

    train: Split
    val: Split
    test: Split


def shuffle_rows(
    size: int, val_size: int, num_train: int | None, seed: int
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " val"]]:
    """Share out the rows of a training set at random, by a generator of its own.

    Args:
        size: rows of the training set.
        val_size: rows that validate.
        num_train: rows that train; `None` takes all that are left.
        seed: of the shuffle.

    Returns:
        Rows that train and rows that validate, each in the order of the set.

    Raises:
        ValueError: there are fewer rows than that.
    """
    if val_size >= size:
        raise ValueError(
            f"Expected `val_size` to be less than the {size} rows of the training set, but got {val_size}."
        )
    num_left = size - val_size
    if num_train is not None and num_train > num_left:
        raise ValueError(
            f"Expected `num_train` to be at most {num_left}, the rows that validation leaves, "
            f"but got {num_train}."
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    # validation comes first, so that it does not change with num_train
    val, train = order[:val_size], order[val_size:][:num_train]
    return train.sort().values, val.sort().values


class AbstractInMemoryDataModule(pl.LightningDataModule, ABC):
    """Load all splits once and iterate over them in batches; the train split is shuffled.

    Args:
        batch_size: rows per batch; the last batch of an epoch may be smaller.
        num_workers: processes that read batches; indexing a tensor needs none.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, batch_size: int, num_workers: int) -> None:
        check_count("batch_size", batch_size)
        check_count("num_workers", num_workers, minimum=0)
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Read the data and split it, the same way on every call."""

    @property
    def splits(self) -> Splits:
        """The splits that `setup` loaded.

        Raises:
            RuntimeError: `setup` was not called yet.
        """
        if self._splits is None:
            name = type(self).__name__
            raise RuntimeError(
                f"Expected `{name}.setup()` to have run before its data is read, but got no data "
                f"yet. A Trainer calls it; without one, call `prepare_data()` and `setup()`."
            )
        return self._splits

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the data once."""
        if self._splits is None:
            self._splits = self.load()

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of the training rows."""
        return self._loader(self.splits.train, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation rows."""
        return self._loader(self.splits.val, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test rows."""
        return self._loader(self.splits.test, shuffle=False)

    def _loader(self, split: Split, *, shuffle: bool) -> DataLoader[Batch]:
        return DataLoader(
            split,
            # batch_size and a stock sampler, not a sampler of batches: Lightning swaps the sampler
            # for a distributed one, and would then serve single rows as if they were batches
            batch_size=self.batch_size,
            shuffle=shuffle and len(split) > 0,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _as_it_is(batch: T) -> T:
    return batch
