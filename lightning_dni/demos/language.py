"""A small language model to train: a `GPT` on the next token."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_dni.demos.arguments import check_choice, check_positive
from lightning_dni.demos.gpt import GPT
from lightning_dni.demos.models import OPTIMIZERS


class GPTLanguageModel(pl.LightningModule):
    """A `GPT` on the next token: `net.embedding`, `net.block_0`, ..., `net.head`.

    A batch is tokens and, for each, the one that follows: `(text[:, :-1], text[:, 1:])`, so that
    gradient estimators find a label per position.

    Args:
        optimizer: a key of `OPTIMIZERS`.
        learning_rate: of that optimizer.
        net: arguments of `GPT`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, optimizer: str = "adam", learning_rate: float = 1e-3, **net: Any) -> None:
        check_choice("optimizer", optimizer, OPTIMIZERS)
        check_positive("learning_rate", learning_rate)
        super().__init__()
        self.net = GPT(**net)
        self._optimizer, self._learning_rate = optimizer, learning_rate
        self.save_hyperparameters()

    @override
    def forward(
        self, tokens: Int[Tensor, " batch positions"]
    ) -> Float[Tensor, " batch positions vocabulary"]:
        """Scores of each position's next token, `[batch, positions, vocabulary]`."""
        return self.net(tokens)  # type: ignore[no-any-return]

    def _loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token, logged as `train_loss`."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the same as `val_loss`."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was asked for."""
        return OPTIMIZERS[self._optimizer](self.parameters(), lr=self._learning_rate)
