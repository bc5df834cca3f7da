"""Points whose labels have nothing to do with them: only a network that memorizes can fit them."""

import torch
from typing_extensions import override

from lightning_dni.demos.arguments import check_count
from lightning_dni.demos.splits import AbstractInMemoryDataModule, Split, Splits


class RandomLabelsDataModule(AbstractInMemoryDataModule):
    """Gaussian points with labels drawn at random, which depend on `seed` alone.

    Validation and test read the training points again, since what is asked is whether the network fits them:
    their accuracy is the training accuracy in evaluation mode. There is nothing to generalize.

    Args:
        num_points: number of points.
        num_features: numbers in a point.
        num_classes: number of classes.
        batch_size: rows per batch.
        seed: of the points and their labels; the global generators are neither read nor moved by it.
        num_workers: processes that read batches.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_points: int = 200,
        num_features: int = 20,
        num_classes: int = 2,
        batch_size: int = 50,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_count("num_points", num_points)
        check_count("num_features", num_features)
        check_count("num_classes", num_classes, minimum=2)
        check_count("seed", seed, minimum=0)
        super().__init__(batch_size, num_workers)
        self.num_points, self.num_features, self.num_classes = num_points, num_features, num_classes
        self.seed = seed

    @override
    def load(self) -> Splits:
        """Draw the points and the labels."""
        generator = torch.Generator().manual_seed(self.seed)
        points = torch.randn(self.num_points, self.num_features, generator=generator)
        labels = torch.randint(self.num_classes, (self.num_points,), generator=generator)
        split = Split(points, labels, torch.arange(self.num_points))
        return Splits(split, split, split)
