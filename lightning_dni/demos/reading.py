"""A character language model that reads a text from beginning to end, a chunk of each part at a time."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_dni.demos.arguments import check_count, check_fraction, check_positive
from lightning_dni.demos.text import VOCABULARY, encode, help_topics

State = tuple[Tensor, Tensor]


class Passage(NamedTuple):
    """The next characters of every part of a text.

    Attributes:
        tokens: Characters.
        following: For each the one that follows.
        anew: Whether the parts begin here.
    """

    tokens: Int64[Tensor, " steps batch"]
    following: Int64[Tensor, " steps batch"]
    anew: Bool[Tensor, " batch"]


class Passages(IterableDataset[Passage]):
    """A text in parts of equal length, which are read side by side.

    Args:
        text: tokens.
        parts: number of parts.
        chunk_length: characters of a chunk; what is left over at the end is not read.
    """

    def __init__(self, text: Int64[Tensor, " characters"], parts: int, chunk_length: int) -> None:
        self._steps = chunk_length
        length = (len(text) - 1) // parts // chunk_length * chunk_length
        self._tokens = text[: parts * length].view(parts, length).t()
        self._following = text[1 : parts * length + 1].view(parts, length).t()

    def __len__(self) -> int:
        return len(self._tokens) // self._steps

    def __iter__(self) -> Iterator[Passage]:
        for k in range(len(self)):
            here = slice(k * self._steps, (k + 1) * self._steps)
            anew = torch.full((self._tokens.shape[1],), k == 0)
            yield Passage(self._tokens[here], self._following[here], anew)


class ReadingDataModule(pl.LightningDataModule):
    """The text of Python's `help()` topics, in order; the end of it validates.

    Args:
        batch_size: number of parts that are read side by side.
        chunk_length: characters of a chunk.
        val_fraction: share of the text that validates.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, batch_size: int = 32, chunk_length: int = 8, val_fraction: float = 0.1) -> None:
        check_count("batch_size", batch_size)
        check_count("chunk_length", chunk_length)
        check_fraction("val_fraction", val_fraction)
        super().__init__()
        self.batch_size, self.chunk_length, self.val_fraction = batch_size, chunk_length, val_fraction

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the text."""
        text = encode(help_topics())
        train = len(text) - round(self.val_fraction * len(text))
        self._train = Passages(text[:train], self.batch_size, self.chunk_length)
        self._val = Passages(text[train:], self.batch_size, self.chunk_length)

    @override
    def train_dataloader(self) -> DataLoader[Passage]:
        """Chunks of the beginning, in order."""
        return DataLoader(self._train, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Passage]:
        """Chunks of the end, in order."""
        return DataLoader(self._val, batch_size=None)


class CharacterModel(pl.LightningModule):
    """An LSTM on the next character, which keeps its state from chunk to chunk; truncate it at `lstm`.

    Args:
        hidden_size: width of the embedding and the LSTM.
        learning_rate: of Adam.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, hidden_size: int = 128, learning_rate: float = 2e-3) -> None:
        check_count("hidden_size", hidden_size)
        check_positive("learning_rate", learning_rate)
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden_size)
        self.lstm = nn.LSTM(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, VOCABULARY)
        self._learning_rate = learning_rate
        self._states: dict[str, State] = {}
        self.save_hyperparameters()

    def _bits(self, batch: Passage, reading: str) -> Float[Tensor, ""]:
        """Bits per character, after what was read before of the same text."""
        tokens, following, anew = batch
        state = None if bool(anew.all()) else self._states.get(reading)
        out, (h, c) = self.lstm(self.embedding(tokens), state)
        self._states[reading] = h.detach(), c.detach()
        return F.cross_entropy(self.head(out).flatten(0, 1), following.flatten()) / math.log(2)

    @override
    def training_step(self, batch: Passage, batch_idx: int) -> Float[Tensor, ""]:
        """Bits per character, logged as `train_bits`."""
        bits = self._bits(batch, "train")
        self.log("train_bits", bits, batch_size=len(batch.anew))
        return bits

    @override
    def validation_step(self, batch: Passage, batch_idx: int) -> None:
        """Log the same as `val_bits`."""
        self.log("val_bits", self._bits(batch, "val"), batch_size=len(batch.anew))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self._learning_rate)
