"""Batches from memory are those that a stock loader would give."""

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_dni.demos.splits import AbstractInMemoryDataModule, Split, Splits

INPUTS = torch.arange(40.0).reshape(20, 2)
TARGETS = torch.arange(20)


class Numbers(AbstractInMemoryDataModule):
    """20 rows: 13 to train, 7 to validate, none to test."""

    num_loads = 0

    def load(self):
        self.num_loads += 1
        rows = (torch.arange(13), torch.arange(13, 20), torch.arange(0))
        return Splits(*(Split(INPUTS, TARGETS, part) for part in rows))


@pytest.fixture
def numbers():
    datamodule = Numbers(batch_size=4, num_workers=0)
    datamodule.setup("fit")
    return datamodule


def test_split_reads_its_rows_and_no_others():
    split = Split(INPUTS, TARGETS, torch.tensor([5, 3]))
    assert len(split) == 2
    inputs, targets = split[1]
    assert inputs.tolist() == [6.0, 7.0]
    assert targets == 3
    inputs, targets = split.__getitems__([1, 0])
    assert inputs.equal(INPUTS[[3, 5]])
    assert targets.tolist() == [3, 5]


def test_splits_share_their_tensors(numbers):
    assert numbers.splits.train.inputs is numbers.splits.val.inputs


@pytest.mark.parametrize("epoch", [0, 1])
def test_train_batches_equal_those_of_a_stock_loader(numbers, epoch):
    stock = DataLoader(TensorDataset(INPUTS[:13], TARGETS[:13]), batch_size=4, shuffle=True)
    torch.manual_seed(epoch)
    expected = list(stock)
    torch.manual_seed(epoch)
    batches = list(numbers.train_dataloader())
    assert len(batches) == len(expected) == len(numbers.train_dataloader()) == 4
    for batch, twin in zip(batches, expected, strict=True):
        assert_close(batch, tuple(twin), rtol=0, atol=0)


def test_every_epoch_is_shuffled_anew(numbers):
    loader = numbers.train_dataloader()
    first, second = (torch.cat([targets for _, targets in loader]) for _ in range(2))
    assert not first.equal(second)
    assert first.sort().values.equal(second.sort().values)


def test_validation_keeps_its_order_and_its_last_batch(numbers):
    assert [targets.tolist() for _, targets in numbers.val_dataloader()] == [
        [13, 14, 15, 16],
        [17, 18, 19],
    ]


def test_empty_split_gives_no_batch(numbers):
    assert list(numbers.test_dataloader()) == []


def test_workers_give_the_same_batches(numbers):
    with_worker = Numbers(batch_size=4, num_workers=1)
    with_worker.setup("fit")
    batches = list(with_worker.val_dataloader())
    for batch, twin in zip(batches, numbers.val_dataloader(), strict=True):
        assert_close(tuple(batch), twin, rtol=0, atol=0)


def test_distributed_sampler_shares_out_whole_batches(numbers):
    """Lightning puts one in under DDP; a sampler of batches would not survive that."""
    loader = numbers.train_dataloader()
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, drop_last=True)
        shard = DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
        assert [tuple(inputs.shape) for inputs, _ in shard] == [(4, 2), (2, 2)]
        seen += [int(target) for _, targets in shard for target in targets]
    assert len(set(seen)) == 12


def test_second_setup_does_not_load_again(numbers):
    numbers.setup("test")
    assert numbers.num_loads == 1


def test_data_before_setup_is_refused():
    with pytest.raises(RuntimeError, match=r"Expected `Numbers\.setup\(\)` to have run"):
        Numbers(batch_size=4, num_workers=0).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "num_workers": 0}, "`batch_size` .* at least 1, but got 0"),
        ({"batch_size": 1, "num_workers": -1}, "`num_workers` .* at least 0, but got -1"),
    ],
)
def test_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Numbers(**arguments)


class Recorder(pl.LightningModule):
    """Remember the targets of every step and learn nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch[1].tolist())

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[1].tolist())

    def configure_optimizers(self):
        return None


def test_trainer_sees_every_row_once_an_epoch():
    model = Recorder()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    ).fit(model, datamodule=Numbers(batch_size=4, num_workers=0))
    epochs = model.trained[:4], model.trained[4:]
    assert [sorted(chain.from_iterable(epoch)) for epoch in epochs] == 2 * [list(range(13))]
    assert model.validated == 2 * [[13, 14, 15, 16], [17, 18, 19]]
