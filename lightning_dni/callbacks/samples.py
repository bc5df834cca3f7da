"""Samples and their classes, as given or as validation reads them."""

from typing import Any

import torch
from torch import Tensor

from lightning_dni.callbacks._compat import MisconfigurationException


class Samples:
    """Inputs and labels of the first rows that validation reads; no data loader is read for them.

    Args:
        size: At most so many are kept.
        given: Inputs and labels, if they come from elsewhere.

    Raises:
        MisconfigurationException: What is given is no tensor of inputs with one class for each.
    """

    def __init__(self, size: int, given: tuple[Tensor, Tensor] | None) -> None:
        self._size, self._is_given = size, given is not None
        self._batches: list[tuple[Tensor, Tensor]] = []
        if given is not None:
            self._add(given)

    @property
    def is_given(self) -> bool:
        """Whether they come from elsewhere."""
        return self._is_given

    @property
    def is_full(self) -> bool:
        """Whether no more are needed."""
        return self._is_given or len(self) >= self._size

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self._batches)

    def restart(self) -> None:
        """Validation begins again, with the same rows."""
        if not self.is_full:
            self._batches.clear()

    def see(self, batch: Any) -> None:
        """Keep what is still needed of a batch.

        Raises:
            MisconfigurationException: It is none of inputs and labels.
        """
        if not self.is_full:
            self._add(batch)

    def joint(self) -> tuple[Tensor, Tensor]:
        """All inputs and labels."""
        inputs, labels = zip(*self._batches, strict=True)
        return torch.cat(inputs)[: self._size], torch.cat(labels)[: self._size]

    def _add(self, batch: Any) -> None:
        if not _are_samples(batch):
            raise MisconfigurationException(
                "Expected `samples` as a tensor of inputs and one of labels, a class from 0 on for each, but "
                f"{'got' if self._is_given else 'validation reads'} {_kind_of(batch)}. Pass "
                "RepresentationMonitor(samples=(inputs, labels))."
            )
        inputs, labels = (tensor.detach().to("cpu", copy=True) for tensor in batch)
        self._batches.append((inputs, labels.long()))


def _are_samples(batch: Any) -> bool:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    inputs, labels = batch
    if not (isinstance(inputs, Tensor) and isinstance(labels, Tensor)) or not inputs.ndim:
        return False
    if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex():
        return False
    return bool((labels >= 0).all())


def _kind_of(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        kinds = [
            f"{tuple(e.shape)} of {e.dtype}" if isinstance(e, Tensor) else type(e).__name__ for e in batch
        ]
        return f"a {type(batch).__name__} of {', '.join(kinds)}"
    return f"a {type(batch).__name__}"
