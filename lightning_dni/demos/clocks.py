"""Two networks at two clock rates, of which one writes to the other (Jaderberg et al. 2017, section 3.2)."""

from collections.abc import Iterator
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_dni.demos.arguments import check_count, check_positive
from lightning_dni.demos.digits import DigitsDataModule
from lightning_dni.demos.splits import Split

Mail = tuple[Tensor, int]
"""Letters `[batch, period * features]`, zero where none has been written, and how many have been."""
PIXELS, CLASSES = 64, 10
WANTED = 3
"""The digit that the slow network counts."""


class Ticks(NamedTuple):
    """What is shown at one or more ticks of the slow clock, which are part of one window.

    Attributes:
        digits: As many images per tick as the fast network ticks in it.
        odd: Number of odd digits among them.
        wanted: Number of threes in the whole window.
        before: The same in the window before.
    """

    digits: Float[Tensor, " ticks period batch pixels"]
    odd: Int64[Tensor, " ticks batch"]
    wanted: Int64[Tensor, " batch"]
    before: Int64[Tensor, " batch"]


class ClockStream(IterableDataset[Ticks]):
    """Windows of `period` times `period` digits drawn at random, without end or `windows` of them.

    Args:
        split: Images and classes.
        period: Ticks of the fast clock per tick of the slow one, and of that per window.
        ticks: Ticks of the slow clock in a batch; a divisor of `period`.
        batch_size: Number of windows at once.
        seed: Of what is drawn.
        windows: How many batches of windows there are; None for no end.
    """

    def __init__(
        self, split: Split, period: int, ticks: int, batch_size: int, seed: int, windows: int | None = None
    ) -> None:
        self._split, self._period, self._ticks = split, period, ticks
        self._batch_size, self._seed, self._windows = batch_size, seed, windows

    def __iter__(self) -> Iterator[Ticks]:
        generator, period = torch.Generator().manual_seed(self._seed), self._period
        before, drawn = torch.zeros(self._batch_size, dtype=torch.int64), 0
        while drawn != self._windows:
            shape = (period, period, self._batch_size)
            rows = self._split.rows[torch.randint(len(self._split), shape, generator=generator)]
            digits, classes = self._split.inputs[rows].flatten(3), self._split.targets[rows]
            odd, wanted = (classes % 2).sum(1), (classes == WANTED).sum((0, 1))
            for k in range(0, period, self._ticks):
                here = slice(k, k + self._ticks)
                yield Ticks(digits[here], odd[here], wanted, before)
            before, drawn = wanted, drawn + 1


class ClocksDataModule(pl.LightningDataModule):
    """Windows of the 1797 digits that scikit-learn ships; others validate than train.

    Args:
        period: Ticks of the fast clock per tick of the slow one, and of that per window.
        locked: Whether a batch is a whole window, or one tick of the slow clock.
        batch_size: Number of windows at once.
        seed: Of what is drawn.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, period: int = 4, locked: bool = False, batch_size: int = 64, seed: int = 0) -> None:
        check_count("period", period, minimum=2)
        check_count("batch_size", batch_size)
        check_count("seed", seed, minimum=0)
        super().__init__()
        self.period, self.locked, self.batch_size, self.seed = period, locked, batch_size, seed
        self._digits = DigitsDataModule(val_fraction=0.3, test_fraction=0.0)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load and split the digits."""
        self._digits.setup()

    @override
    def train_dataloader(self) -> DataLoader[Ticks]:
        """Windows without end."""
        ticks = self.period if self.locked else 1
        split = self._digits.splits.train
        return DataLoader(ClockStream(split, self.period, ticks, self.batch_size, self.seed), batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Ticks]:
        """The same 1,024 whole windows for every seed."""
        split = self._digits.splits.val
        return DataLoader(ClockStream(split, self.period, self.period, 1024, 0, windows=1), batch_size=None)


class TwoClocks(nn.Module):
    """A fast network that counts odd digits, a slow one that counts threes, and the letters between them.

    The fast network sees every digit. After `period` of them it says how many were odd, and writes a letter.
    The slow network never sees a digit: it reads `period` letters at once, when the next window begins.
    Called as `module(digits, mail)`, it is a recurrent module whose state is the mail.

    Args:
        period: Digits per letter, and letters per window.
        hidden_size: Width of both networks.
        letter_size: Width of a letter.
    """

    def __init__(self, period: int, hidden_size: int, letter_size: int) -> None:
        super().__init__()
        self.period = period
        self.look = nn.Linear(PIXELS, hidden_size)
        self.fast = nn.LSTM(hidden_size, hidden_size)
        self.count_odd = nn.Linear(hidden_size, period + 1)
        self.write = nn.Linear(hidden_size, letter_size)
        self.slow = nn.LSTM(letter_size, hidden_size)
        self.count_wanted = nn.Linear(hidden_size, period**2 + 1)

    def read(self, letters: Float[Tensor, " batch letters"]) -> Float[Tensor, " batch counts"]:
        """The slow network's answer: logits of the number of threes in a window."""
        _, (h, _) = self.slow(letters.view(len(letters), self.period, -1).transpose(0, 1))
        logits: Tensor = self.count_wanted(h[0])
        return logits

    def forward(
        self, digits: Float[Tensor, " period batch pixels"], mail: Mail | None = None
    ) -> tuple[tuple[Tensor, Tensor | None], Mail]:
        """Logits of the number of odd digits, and of the threes in the window before, where it was full."""
        empty = digits.new_zeros(digits.shape[1], self.period * self.write.out_features)
        letters, written = (empty, 0) if mail is None else mail
        answer = None
        if written == self.period:
            answer, letters, written = self.read(letters), empty, 0
        _, (h, _) = self.fast(torch.relu(self.look(digits)))
        letter = torch.tanh(self.write(h[0]))
        place = F.one_hot(torch.tensor(written), self.period).to(letter)
        return (self.count_odd(h[0]), answer), (letters + torch.kron(place, letter), written + 1)


class TwoClocksModel(pl.LightningModule):
    """Trains both networks; nothing in it knows of synthetic gradients, truncate it at `clocks`.

    With a tick of the slow clock per batch the fast network is updated at each, and letters are detached;
    with a window per batch it waits for the slow network, and the gradient comes back through the letters.

    Args:
        period: Digits per letter, and letters per window.
        hidden_size: Width of both networks.
        letter_size: Width of a letter.
        learning_rate: Of Adam.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, period: int = 4, hidden_size: int = 64, letter_size: int = 8, learning_rate: float = 1e-3
    ) -> None:
        check_count("period", period, minimum=2)
        check_count("hidden_size", hidden_size)
        check_count("letter_size", letter_size)
        check_positive("learning_rate", learning_rate)
        super().__init__()
        self.clocks = TwoClocks(period, hidden_size, letter_size)
        self._learning_rate = learning_rate
        self._mail: Mail | None = None
        self._digits = 0
        self.save_hyperparameters()

    def _answer(self, batch: Ticks) -> tuple[list[Tensor], Tensor]:
        """Logits of both networks on a whole window, with the gradient between them."""
        odd, mail = [], None
        for digits in batch.digits:
            (said, _), mail = self.clocks(digits, mail)
            odd.append(said)
        assert mail is not None
        return odd, self.clocks.read(mail[0])

    @override
    def training_step(self, batch: Ticks, batch_idx: int) -> Float[Tensor, ""]:
        """Cross-entropy of both counts, mean over windows, summed over what is asked in the batch."""
        self._digits += batch.digits.shape[:2].numel()
        if len(batch.digits) == self.clocks.period:
            odd, answer = self._answer(batch)
            asked = batch.wanted
        else:
            (said, answer), (letters, written) = self.clocks(batch.digits[0], self._mail)
            self._mail = letters.detach(), written
            odd, asked = [said], batch.before
        losses = [F.cross_entropy(logits, count) for logits, count in zip(odd, batch.odd, strict=True)]
        if answer is not None:
            losses.append(F.cross_entropy(answer, asked))
        return torch.stack(losses).sum()

    @override
    def validation_step(self, batch: Ticks, batch_idx: int) -> None:
        """Log the share of right counts as `odd` and `threes`, over the digits seen in training as step."""
        odd, answer = self._answer(batch)
        hits = torch.stack(odd).argmax(-1) == batch.odd
        self.log("odd", hits.float().mean(), batch_size=len(batch.wanted))
        right = (answer.argmax(-1) == batch.wanted).float().mean()
        self.log("threes", right, batch_size=len(batch.wanted))
        self.log("step", float(self._digits), batch_size=len(batch.wanted))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self._learning_rate)
