"""Text is cut into windows that do not overlap, each with the characters that follow."""

from pydoc_data.topics import topics

import pytest
import torch

from lightning_dni.demos import TextDataModule, count_tokens
from lightning_dni.demos.text import VOCABULARY, encode


def text(**options):
    datamodule = TextDataModule(**options)
    datamodule.setup()
    return datamodule


def test_windows_are_the_text_and_targets_are_one_further():
    splits = text(context_length=16).splits
    whole = encode("\n".join(topics[name] for name in sorted(topics)))
    read = splits.train.inputs.flatten()
    assert len(whole) - 17 <= len(read) < len(whole)
    assert read.equal(whole[: len(read)])
    assert splits.train.targets.flatten().equal(whole[1 : len(read) + 1])


def test_splits_are_disjoint_and_complete_and_the_last_windows_are_held_out():
    splits = text(val_fraction=0.1, test_fraction=0.2).splits
    rows = torch.cat([split.rows for split in splits])
    assert rows.equal(torch.arange(len(splits.train.inputs)))
    assert len(splits.val) == round(0.1 * len(rows))
    assert len(splits.test) == round(0.2 * len(rows))


def test_tokens_are_in_the_vocabulary_and_nearly_all_are_known():
    tokens = text().splits.train.inputs
    assert tokens.min() >= 0
    assert tokens.max() < VOCABULARY
    assert (tokens == 1).float().mean() < 0.01
    assert len(tokens.unique()) > 60


def test_a_batch_says_how_many_tokens_it_has():
    tokens, following = next(iter(text(batch_size=3, context_length=5).train_dataloader()))
    assert tokens.shape == following.shape == (3, 5)
    assert count_tokens((tokens, following), tokens) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "Expected `context_length` to be an integer of at least 1, but got 0"),
        ({"val_fraction": 1.0}, r"Expected `val_fraction` to be a fraction in \[0, 1\), but got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "to sum to less than 1, but got 0.5 and 0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**options)
