"""A text that is read in order, side by side, by a model that remembers what it has read."""

import pytest
import torch
from fits import quiet_trainer
from torch.nn import functional as F

from lightning_dni import DNIStrategy
from lightning_dni.demos import CharacterModel, ReadingDataModule
from lightning_dni.demos.reading import Passages
from lightning_dni.demos.text import encode, help_topics
from lightning_dni.estimators import LinearEstimator


def test_every_character_is_read_once_and_in_order():
    text = torch.arange(50)
    chunks = list(Passages(text, 3, 5))
    assert len(chunks) == len(Passages(text, 3, 5)) == 3
    tokens, following = (torch.cat([c[k] for c in chunks]) for k in (0, 1))
    assert tokens.t().flatten().tolist() == list(range(45))
    assert torch.equal(following, tokens + 1)
    assert [c.anew.tolist() for c in chunks] == [[True] * 3, [False] * 3, [False] * 3]


def test_the_end_of_the_text_validates():
    data = ReadingDataModule(batch_size=4, chunk_length=50, val_fraction=0.25)
    data.setup()
    text = encode(help_topics())
    first, last = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert torch.equal(first.tokens[:, 0], text[:50])
    begin = len(text) - round(0.25 * len(text))
    assert torch.equal(last.tokens[:, 0], text[begin : begin + 50])


def test_the_model_goes_on_from_what_it_has_read():
    """Bits of the second chunk are those of the whole passage, read at once."""
    torch.manual_seed(0)
    model, chunks = CharacterModel(hidden_size=4), list(Passages(torch.arange(25) % 7, 2, 4))
    with torch.no_grad():
        found = [model._bits(chunk, "val") for chunk in chunks]
        model._bits(chunks[2], "other")
        tokens, following = (torch.cat([c[k] for c in chunks]) for k in (0, 1))
        out, _ = model.lstm(model.embedding(tokens))
        bits = F.cross_entropy(model.head(out).flatten(0, 1), following.flatten()) / torch.tensor(2.0).log()
    torch.testing.assert_close(torch.stack(found).mean(), bits)


def test_the_model_trains_on_synthetic_gradients():
    strategy = DNIStrategy(truncations=["lstm"], estimator=LinearEstimator, damping=0.1)
    trainer = quiet_trainer(strategy, limit_train_batches=3, limit_val_batches=1)
    trainer.fit(CharacterModel(hidden_size=4), ReadingDataModule(batch_size=4, chunk_length=3))
    assert strategy.engine.estimators["lstm"].map.weight.any()
    assert {"train_bits", "val_bits"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (ReadingDataModule, {"chunk_length": 0}, "`chunk_length` to be an integer of at least 1"),
        (ReadingDataModule, {"batch_size": 0}, "`batch_size` to be an integer of at least 1"),
        (ReadingDataModule, {"val_fraction": 1.0}, "`val_fraction` to be a fraction"),
        (CharacterModel, {"hidden_size": 0}, "`hidden_size` to be an integer of at least 1"),
        (CharacterModel, {"learning_rate": 0.0}, "`learning_rate` to be a finite number above 0"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
