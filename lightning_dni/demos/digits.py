"""The 1797 handwritten digits of 8x8 pixels that scikit-learn ships."""

from itertools import accumulate

import torch
from jaxtyping import Int64
from sklearn.datasets import load_digits
from torch import Tensor
from typing_extensions import override

from lightning_dni.demos.arguments import check_count, check_held_out
from lightning_dni.demos.splits import AbstractInMemoryDataModule, Split, Splits


class DigitsDataModule(AbstractInMemoryDataModule):
    """Digits in [0, 1], shaped (1, 8, 8), in a stratified split that depends on `seed` alone.

    Args:
        batch_size: rows per batch.
        val_fraction: share of every class that validates.
        test_fraction: share of every class that tests.
        seed: of the split; the global generators are neither read nor moved by it.
        num_workers: processes that read batches.

    Raises:
        ValueError: an argument is out of range, or nothing is left to train on.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_held_out(val_fraction, test_fraction)
        check_count("seed", seed, minimum=0)
        super().__init__(batch_size, num_workers)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed

    @override
    def load(self) -> Splits:
        """Split the embedded digits."""
        images, labels = load_digits(return_X_y=True)
        inputs = torch.from_numpy(images).float().div_(16).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(labels).long()
        val, test, train = split_by_class(targets, (self.val_fraction, self.test_fraction), seed=self.seed)
        return Splits(*(Split(inputs, targets, rows) for rows in (train, val, test)))


def split_by_class(
    targets: Int64[Tensor, " all"], fractions: tuple[float, ...], *, seed: int
) -> list[Int64[Tensor, " _"]]:
    """Deal the rows of every class into parts of the given shares, and one part for the rest.

    Args:
        targets: the class of each row.
        fractions: share of each part, rounded to whole rows within every class.
        seed: of the order in which rows are dealt.

    Returns:
        The rows of each part in ascending order, the rest last.

    Example:
        >>> halves = split_by_class(torch.tensor([0, 0, 1, 1, 1, 1]), (0.5,), seed=0)
        >>> [len(rows) for rows in halves]
        [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in sorted(set(targets.tolist())):
        rows = (targets == label).nonzero().flatten()
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        ends = accumulate((round(fraction * len(rows)) for fraction in fractions), initial=0)
        cuts = [*ends, len(rows)]
        for part, start, end in zip(parts, cuts, cuts[1:], strict=False):
            part.append(shuffled[start:end])
    return [torch.cat(part).sort().values for part in parts]
