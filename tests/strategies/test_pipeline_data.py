"""Every stage reads the same batches, or all processes are told which one differs."""

import itertools
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from fits import CLASSES, FEATURES, LINEAR, AtBatchEnd, Net, dataset, different, fit, loader, net, weights
from processes import ReplicaError
from strategies.staged_fits import Batches, fit_staged, on_stages, staged
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_dni import DNIPipelineStrategy, DNIStrategy
from lightning_dni.pipeline import passage
from lightning_dni.pipeline.passage import fingerprint
from lightning_dni.strategies import placement


class Augmented(Dataset):
    """Adds noise of every generator that a worker has."""

    def __init__(self):
        self.rows = dataset(24)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        x, y = self.rows[index]
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return x + noise, y


def augmented(rank, seeding):
    if seeding:
        pl.seed_everything(3, workers=True)
    batches = Batches()
    train = DataLoader(Augmented(), 4, shuffle=True, num_workers=2)
    fit_staged(train=train, max_epochs=2, callbacks=[batches], use_distributed_sampler=True)
    return batches.seen


@pytest.mark.parametrize("seeding", [True, False])
def test_workers_of_all_stages_augment_alike(seeding):
    first, second = on_stages(augmented, seeding)
    assert first == second
    assert len(set(first)) == 12


def test_a_seeded_worker_of_a_stage_draws_what_one_process_draws():
    def alone(rank):
        pl.seed_everything(0, workers=True)
        batches = Batches()
        fit(net(), train=DataLoader(Augmented(), 4, num_workers=2), callbacks=[batches])
        return batches.seen

    def together(rank):
        pl.seed_everything(0, workers=True)
        batches = Batches()
        fit_staged(train=DataLoader(Augmented(), 4, num_workers=2), callbacks=[batches])
        return batches.seen

    expected = on_stages(alone, stages=1)[0]
    assert on_stages(together) == [expected, expected]


def test_a_worker_function_of_the_users_stays():
    def body(rank):
        given = DataLoader(dataset(), 4, worker_init_fn=id)
        pl.seed_everything(3, workers=True)
        kept = staged().process_dataloader(given)
        return kept is given, given.worker_init_fn is id

    assert body(0) == (True, True)


# ---- orders


def order(rank, options, ours):
    batches = Batches()
    fit_staged(train=loader(24, shuffle=True), max_epochs=2, callbacks=[batches], **options)
    return batches.seen


@pytest.mark.parametrize("injected", [True, False])
def test_a_shuffling_loader_gives_all_stages_the_same_order(injected):
    first, second = on_stages(order, {"use_distributed_sampler": injected}, True)
    assert first == second
    assert first[:3] != first[3:]
    assert len(first) == 6


class Noisy(Net):
    """Draws in validation on the second stage, and by dropout on the first."""

    def validation_step(self, batch, batch_idx):
        self.net[0].train()
        h = self.net[0](batch[0])
        noise = torch.randn_like(h)
        self.net[0].eval()
        self.log("val_loss", F.cross_entropy(self.net[2](self.net[1](h + noise)), batch[1]))
        self.log("noise", noise[0, 0])


def test_what_a_validation_draws_changes_no_batch():
    def body(rank, kind):
        torch.manual_seed(0)
        module = kind(dropout=0.5)
        trainer = fit_staged(module=module, train=loader(shuffle=True), val=loader(16), max_epochs=3)
        return weights(module), trainer.callback_metrics.get("noise")

    (found, noise), (other, _) = on_stages(body, Noisy)
    (expected, _), _ = on_stages(body, Net)
    assert different(found, expected) == different(other, expected) == []
    assert noise != 0


class Stream(IterableDataset):
    def __iter__(self):
        yield from dataset(24)


def test_an_iterable_data_set_is_read_by_all_stages():
    def body(rank):
        batches = Batches()
        fit_staged(train=DataLoader(Stream(), 5), max_epochs=2, callbacks=[batches])
        return batches.seen

    first, second = on_stages(body)
    assert first == second
    assert len(first) == 10


def test_all_stages_read_the_same_batches_after_a_resume_in_mid_epoch():
    """As in one process: what is left of the epoch is read from the start of its order, then the next one."""

    def body(rank):
        whole, after = Batches(), Batches()
        save = AtBatchEnd(
            lambda trainer, *_: trainer.global_step == 3 and trainer.save_checkpoint("mid.ckpt")
        )
        options = {"train": loader(40, shuffle=True), "max_epochs": 2, "use_distributed_sampler": True}
        fit_staged(callbacks=[whole, save], **options)
        fit_staged(callbacks=[after], ckpt_path="mid.ckpt", **options)
        return whole.seen, after.seen

    first, second = on_stages(body, seconds=120)
    assert first == second
    whole, after = first
    assert after == whole[:2] + whole[5:]


# ---- batches of other forms


class Nested(Net):
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["in"]["x"]), batch["labels"][0])
        self.log("loss", loss)
        return loss


def nested(samples):
    x, y = default_collate(samples)
    return {"in": {"x": x, "names": [f"row {i}" for i in range(len(x))]}, "labels": [y, None]}


def test_dicts_and_nested_batches_train_as_in_one_process():
    options = {"labels": lambda batch: batch["labels"][0]}

    def body(rank, ours=False):
        torch.manual_seed(0)
        module = Nested()
        train = DataLoader(dataset(), 8, collate_fn=nested)
        if ours:
            fit_staged(module=module, train=train, strategy=staged(staleness=0, **options))
        else:
            one = DNIStrategy(["net.0"], staged()._options.estimator, rng="stage", **options)
            fit(module, one, train)
        return weights(module)

    expected = body(0)
    for found in on_stages(body, True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- what differs


class Differs(Dataset):
    """Rows of which one, in batch 3, is another one in the process `rank`."""

    def __init__(self, rank, at):
        self.rows, self.rank, self.at = dataset(40), rank, at

    def __len__(self):
        return 40

    def __getitem__(self, index):
        x, y = self.rows[index]
        return (x + 1e-3 if self.rank == 1 and index == self.at else x), y


@pytest.mark.parametrize("row", [0, 12, 15])
def test_the_first_batch_that_differs_is_named_on_all_ranks(row):
    def body(rank):
        fit_staged(train=DataLoader(Differs(rank, row), 4))

    with pytest.raises(ReplicaError) as caught:
        on_stages(body, seconds=40)
    said = "same first batch" if row < 4 else f"train batch {row // 4} differs"
    assert str(caught.value).count(said) >= 2
    assert "hangs" not in str(caught.value)


class Moving(DNIPipelineStrategy):
    """Takes the CPU for another device."""

    _moves_batches = True


@pytest.mark.parametrize("row", [0, 12])
@pytest.mark.parametrize(
    "options", [{"estimator": LINEAR}, {"schedule": "1f1b", "microbatches": 2}], ids=["dni", "1f1b"]
)
def test_batches_are_compared_as_they_were_before_they_were_moved(options, row, monkeypatch):
    """Where they are, nobody reads them back."""
    for module in (passage, placement):
        monkeypatch.setattr(module, "fingerprint", lambda batch, before: before)

    def body(rank):
        fit_staged(train=DataLoader(Differs(rank, row), 4), strategy=Moving(["net.0"], **options))

    with pytest.raises(ReplicaError) as caught:
        on_stages(body, seconds=40)
    assert str(caught.value).count("same first batch" if row < 4 else "differs between them") >= 2


@pytest.mark.parametrize(("longer", "batches"), [(0, 6), (1, 6), (0, 20), (1, 20)])
def test_loaders_of_different_length_are_an_error_on_all_ranks(longer, batches):
    def body(rank):
        fit_staged(train=loader(8 * (batches if rank == longer else batches - 1)), max_epochs=2)

    with pytest.raises(ReplicaError) as caught:
        on_stages(body, seconds=40)
    assert str(caught.value).count("same number of batches") >= 2
    assert "hangs" not in str(caught.value)


def test_validation_loaders_that_differ_are_an_error_on_all_ranks():
    def body(rank):
        fit_staged(val=loader(16 + 8 * rank))

    with pytest.raises(ReplicaError, match="same number of batches"):
        on_stages(body, seconds=40)


@pytest.mark.parametrize(
    ("one", "other"),
    list(
        itertools.combinations(
            [
                torch.zeros(4, FEATURES),
                torch.zeros(FEATURES, 4),
                [torch.zeros(4, FEATURES), torch.arange(4) % CLASSES],
                {"x": torch.zeros(4, FEATURES), "name": "a"},
                {"x": torch.zeros(4, FEATURES), "name": "b"},
            ],
            2,
        )
    ),
)
def test_fingerprints_tell_batches_apart(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_a_fingerprint_sees_a_change_in_every_row_of_a_large_batch():
    images = torch.zeros(64, 1, 28, 28)
    before = fingerprint(images)
    for row in range(64):
        changed = images.clone()
        changed[row] += torch.rand(28, 28)
        assert fingerprint(changed) != before


# ---- what passes beside the boundaries


class Remembering(nn.Module):
    """Keeps a number of its output, in an attribute of its own."""

    def __init__(self, as_what):
        super().__init__()
        self.linear, self.seen, self.as_what = nn.Linear(FEATURES, 8), torch.zeros(()), as_what

    def forward(self, x):
        h = self.linear(x).relu()
        self.seen = self.as_what(h.mean(), self.seen)
        return h


def put_in(mean, seen):
    return seen.copy_(mean.detach())


class Reading(Net):
    """Reads it in a stage above, in training or in evaluation."""

    def __init__(self, as_what, in_training):
        super().__init__()
        self.net[0], self.in_training = Remembering(as_what), in_training

    def forward(self, x):
        out = self.net(x)
        return out * (1.0 + self.net[0].seen) if self.training is self.in_training else out


@pytest.mark.parametrize("in_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "as_what",
    [lambda mean, seen: float(mean), lambda mean, seen: mean.detach(), put_in],
    ids=["number", "tensor", "in place"],
)
def test_an_attribute_that_a_stage_above_reads_is_found(as_what, in_training):
    """It is never set there; in the copy on which the stages are compared with the whole, it was."""

    def body(rank):
        fit_staged(module=Reading(as_what, in_training), val=loader(16), max_epochs=1)

    with pytest.raises(ReplicaError, match="the chained stages to compute what the whole model does"):
        on_stages(body, seconds=40)
