"""Copy and repeat copy: endless sequences in chunks, longer ones as soon as the error is small."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from jaxtyping import Bool, Float, Int64
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_dni.demos.arguments import check_choice, check_count, check_positive

TASKS = ("copy", "repeat_copy")
SILENT = -100
"""The target where nothing is asked, which cross-entropy ignores."""


class Chunk(NamedTuple):
    """The next steps of every sequence of a batch.

    Attributes:
        inputs: One symbol, the sign to copy, or nothing, one-hot, and a number of copies over ten.
        targets: The symbol to say, or `SILENT`.
        anew: Which sequences begin with this chunk.
        ahead: The targets of the steps that follow in the sequence, one-hot: a context for estimators.
    """

    inputs: Float[Tensor, " steps batch features"]
    targets: Int64[Tensor, " steps batch"]
    anew: Bool[Tensor, " batch"]
    ahead: Float[Tensor, " batch classes_ahead"]


class CopyStream(IterableDataset[Chunk]):
    """As many sequences at once as a batch has rows, each at a place of its own.

    A sequence is `length` symbols and a sign, at whose step the number of copies stands, too; then the
    symbols are to be said again, that often, and in repeat copy a last symbol that ends it. It is filled up
    to whole chunks.

    Args:
        task: a key of `TASKS`.
        chunk_length: steps of a chunk.
        batch_size: number of sequences at once.
        symbols: number of different symbols.
        look_ahead: steps whose targets stand in `ahead`.
        seed: of the symbols.

    Attributes:
        length: symbols in the sequences that begin from now on.
        copies: how often they are to be said.
    """

    def __init__(
        self, task: str, chunk_length: int, batch_size: int, symbols: int, look_ahead: int, seed: int
    ) -> None:
        self._repeats, self._symbols, self._look_ahead = task == "repeat_copy", symbols, look_ahead
        self._steps, self._batch_size, self._seed = chunk_length, batch_size, seed
        self.length = self.copies = 1

    @property
    def dependency(self) -> int:
        """Number of symbols to say."""
        return self.length * self.copies

    def lengthen(self) -> None:
        """Make it harder: more symbols, and in repeat copy every other time more copies."""
        if self._repeats and self.copies < self.length:
            self.copies += 1
        else:
            self.length += 1

    @property
    def chunks_per_sequence(self) -> int:
        """Number of chunks of the sequences that begin from now on."""
        return math.ceil((self.length + 1 + self.dependency + self._repeats) / self._steps)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs `[rows, steps, features]` and targets `[rows, steps]` of new sequences."""
        steps, n = self.chunks_per_sequence * self._steps, self.length
        symbols = torch.randint(self._symbols, (rows, n), generator=generator)
        inputs = torch.zeros(rows, steps, self._symbols + 2)
        inputs[:, :n] = F.one_hot(symbols, self._symbols + 2).to(inputs.dtype)
        inputs[:, n, self._symbols] = 1.0
        inputs[:, n, self._symbols + 1] = self.copies / 10
        targets = torch.full((rows, steps), SILENT)
        end = n + 1 + self.dependency
        targets[:, n + 1 : end] = symbols.repeat(1, self.copies)
        if self._repeats:
            targets[:, end] = self._symbols
        return inputs, targets

    def __iter__(self) -> Iterator[Chunk]:
        generator, rows = torch.Generator().manual_seed(self._seed), torch.arange(self._batch_size)
        here, further = torch.arange(self._steps), torch.arange(self._look_ahead) + self._steps
        inputs, targets = self._draw(self._batch_size, generator)
        lengths = torch.full_like(rows, inputs.shape[1])
        at = rows % self.chunks_per_sequence * self._steps
        while True:
            index = at.unsqueeze(1) + here
            coming = F.pad(targets, (0, self._look_ahead), value=SILENT)
            coming = coming.gather(1, at.unsqueeze(1) + further)
            yield Chunk(
                inputs[rows.unsqueeze(1), index].transpose(0, 1),
                targets.gather(1, index).t(),
                at == 0,
                one_hot(coming, self._symbols + 1).flatten(1),
            )
            at = at + self._steps
            over = (at >= lengths).nonzero().flatten()
            if len(over):
                fresh = self._draw(len(over), generator)
                more = max(0, fresh[0].shape[1] - inputs.shape[1])
                inputs, targets = F.pad(inputs, (0, 0, 0, more)), F.pad(targets, (0, more), value=SILENT)
                at[over], lengths[over] = 0, fresh[0].shape[1]
                inputs[over], targets[over] = 0.0, SILENT
                inputs[over, : fresh[0].shape[1]], targets[over, : fresh[1].shape[1]] = fresh


def one_hot(targets: Int64[Tensor, " *dims"], classes: int) -> Float[Tensor, " *dims classes"]:
    """One-hot vectors, zero where nothing is asked.

    >>> one_hot(torch.tensor([1, SILENT]), 2)
    tensor([[0., 1.],
            [0., 0.]])
    """
    asked = (targets != SILENT).unsqueeze(-1)
    return (F.one_hot(targets.clamp(min=0), classes) * asked).to(torch.get_default_dtype())


class CopyDataModule(pl.LightningDataModule):
    """Chunks of a `CopyStream`; each is a batch.

    Args:
        task: "copy" or "repeat_copy".
        chunk_length: steps of a chunk: through so many backprop runs.
        batch_size: number of sequences at once.
        symbols: number of different symbols.
        look_ahead: steps after a chunk whose targets are given as a context, which estimators with
            `context_size=look_ahead * (symbols + 1)` see with `labels="ahead"`.
        seed: of the symbols.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        task: str = "copy",
        chunk_length: int = 4,
        batch_size: int = 64,
        symbols: int = 8,
        look_ahead: int = 12,
        seed: int = 0,
    ) -> None:
        check_choice("task", task, TASKS)
        check_count("chunk_length", chunk_length)
        check_count("batch_size", batch_size)
        check_count("symbols", symbols, minimum=2)
        check_count("look_ahead", look_ahead)
        check_count("seed", seed, minimum=0)
        super().__init__()
        self.stream = CopyStream(task, chunk_length, batch_size, symbols, look_ahead, seed)

    @override
    def train_dataloader(self) -> DataLoader[Chunk]:
        """Chunks without end."""
        return DataLoader(self.stream, batch_size=None)


class CopyModel(pl.LightningModule):
    """An LSTM that reads a chunk per batch and keeps its state from one to the next.

    Nothing in it knows of synthetic gradients; truncate it at `lstm`.

    Args:
        hidden_size: width of the LSTM.
        symbols: number of different symbols.
        learning_rate: of Adam.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, hidden_size: int = 64, symbols: int = 8, learning_rate: float = 1e-3) -> None:
        check_count("hidden_size", hidden_size)
        check_positive("learning_rate", learning_rate)
        super().__init__()
        self.lstm = torch.nn.LSTM(symbols + 2, hidden_size)
        self.head = torch.nn.Linear(hidden_size, symbols + 1)
        self._learning_rate = learning_rate
        self._state: tuple[Tensor, Tensor] | None = None
        self.save_hyperparameters()

    @override
    def training_step(self, batch: Chunk, batch_idx: int) -> STEP_OUTPUT:
        """Cross-entropy of all symbols in the chunk, mean over sequences."""
        inputs, targets, anew, _ = batch
        state = self._state
        if state is not None:
            goes_on = (~anew).to(inputs.dtype).view(1, -1, 1)
            state = (state[0] * goes_on, state[1] * goes_on)
        out, (h, c) = self.lstm(inputs, state)
        self._state = h.detach(), c.detach()
        error = F.cross_entropy(self.head(out).flatten(0, 1), targets.flatten(), reduction="sum")
        return {"loss": error / len(anew), "nats": error.detach(), "said": (targets != SILENT).sum()}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self._learning_rate)


class CopyCurriculum(pl.Callback):
    """Longer sequences once the error is small (Jaderberg et al. 2017, appendix C).

    The error is that of all symbols over two sequences' time, after which it begins anew. Logs `bits`, the
    error per symbol, and `solved_length`, the number of symbols to say in the longest sequences that were
    solved.

    Args:
        threshold: bits per symbol below which sequences get longer.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, threshold: float = 0.15) -> None:
        check_positive("threshold", threshold)
        self.threshold = threshold
        self.solved = 0
        self._nats, self._said, self._chunks = 0.0, 0, 0

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in a chunk; judge after two sequences."""
        assert isinstance(outputs, dict)
        stream: CopyStream = getattr(trainer, "datamodule").stream  # noqa: B009  (set by a connector, untyped)
        self._nats += outputs["nats"].item()
        self._said += int(outputs["said"])
        self._chunks += 1
        if self._chunks < 2 * stream.chunks_per_sequence:
            return
        bits = self._nats / max(1, self._said) / math.log(2)
        self._nats, self._said, self._chunks = 0.0, 0, 0
        if bits < self.threshold:
            self.solved = stream.dependency
            stream.lengthen()
        pl_module.log_dict({"bits": bits, "solved_length": float(self.solved)})
