"""Half a million characters of English prose about Python, which every Python ships with `pydoc`."""

from pydoc_data.topics import topics

import torch
from jaxtyping import Int64
from torch import Tensor
from typing_extensions import override

from lightning_dni.demos.arguments import check_count, check_held_out
from lightning_dni.demos.splits import AbstractInMemoryDataModule, Batch, Split, Splits

FIRST, LAST = " ", "~"
VOCABULARY = 2 + ord(LAST) - ord(FIRST) + 1
"""Printable ASCII, the end of a line, and one token for any other character."""


class TextDataModule(AbstractInMemoryDataModule):
    """Windows of characters, and for each the ones that follow: `(text[:, :-1], text[:, 1:])`.

    The text is that of Python's `help()` topics. The windows do not overlap; the last ones validate
    and test. Its exact words depend on the version of Python.

    Args:
        batch_size: windows per batch.
        context_length: characters per window.
        val_fraction: share of the windows that validates.
        test_fraction: share of the windows that tests.
        num_workers: processes that read batches.

    Raises:
        ValueError: an argument is out of range, or nothing is left to train on.
    """

    def __init__(
        self,
        batch_size: int = 32,
        context_length: int = 64,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_workers: int = 0,
    ) -> None:
        check_count("context_length", context_length)
        check_held_out(val_fraction, test_fraction)
        super().__init__(batch_size, num_workers)
        self.context_length = context_length
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    @override
    def load(self) -> Splits:
        """Cut the text into windows."""
        text = encode(help_topics())
        windows = text.unfold(0, self.context_length + 1, self.context_length)
        test = len(windows) - round(self.test_fraction * len(windows))
        val = test - round(self.val_fraction * len(windows))
        rows = torch.arange(len(windows))
        parts = (rows[:val], rows[val:test], rows[test:])
        return Splits(*(Split(windows[:, :-1], windows[:, 1:], part) for part in parts))


def help_topics() -> str:
    """The text, topic after topic."""
    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Int64[Tensor, " characters"]:
    r"""A token per character: 0 for the end of a line, 1 for what is not printable ASCII, then the rest.

    Example:
        >>> encode(" ~\né")
        tensor([ 2, 96,  0,  1])
    """
    tokens = [0 if c == "\n" else 2 + ord(c) - ord(FIRST) if FIRST <= c <= LAST else 1 for c in text]
    return torch.tensor(tokens, dtype=torch.int64)


def count_tokens(batch: Batch, h: Tensor) -> float:
    """How many tokens a batch has, which is what a mean over tokens is divided by (`loss_denominator`)."""
    return float(batch[1].numel())
