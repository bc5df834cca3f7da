"""The digits are split by class, by their own seed, and can be learnt."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_dni.demos import ConvClassifier, DigitsDataModule, MLPClassifier
from lightning_dni.demos.digits import split_by_class


def digits(**options):
    datamodule = DigitsDataModule(**options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def test_images_are_scaled_floats():
    inputs = digits().splits.train.inputs
    assert inputs.shape == (1797, 1, 8, 8)
    assert inputs.dtype == torch.float32
    assert (inputs.min(), inputs.max()) == (0.0, 1.0)


def test_images_and_labels_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    train = digits().splits.train
    assert train.inputs.flatten(1).mul(16).equal(torch.tensor(images, dtype=torch.float32))
    assert train.targets.equal(torch.tensor(labels))


@pytest.mark.parametrize(("val", "test"), [(0.15, 0.15), (0.3, 0.05), (0.0, 0.2), (0.2, 0.0)])
def test_splits_are_disjoint_complete_and_stratified(val, test):
    splits = digits(val_fraction=val, test_fraction=test).splits
    rows = torch.cat([split.rows for split in splits])
    assert rows.sort().values.equal(torch.arange(1797))
    totals = splits.train.targets.bincount()
    for split, fraction in ((splits.val, val), (splits.test, test)):
        expected = [round(fraction * int(total)) for total in totals]
        assert split.targets[split.rows].bincount(minlength=10).tolist() == expected


def test_default_sizes():
    assert [len(split) for split in digits().splits] == [1259, 269, 269]


def test_same_seed_same_split_and_other_seed_another():
    first, second, other = (digits(seed=seed).splits for seed in (3, 3, 4))
    for part in range(3):
        assert first[part].rows.equal(second[part].rows)
        assert not first[part].rows.equal(other[part].rows)


def test_split_neither_reads_nor_moves_the_global_generators():
    torch.manual_seed(1)
    np.random.seed(1)
    first = digits().splits
    torch.manual_seed(2)
    np.random.seed(2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    second = digits().splits
    assert torch.get_rng_state().equal(torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert first.train.rows.equal(second.train.rows)


def test_batches_have_the_size_asked_for():
    datamodule = digits(batch_size=100)
    sizes = [len(targets) for _, targets in datamodule.train_dataloader()]
    assert sizes == 12 * [100] + [59]
    inputs, targets = next(iter(datamodule.val_dataloader()))
    assert inputs.shape == (100, 1, 8, 8)
    assert targets.dtype == torch.int64


def test_parts_are_dealt_within_each_class():
    targets = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1, 2])
    half, quarter, rest = split_by_class(targets, (0.5, 0.25), seed=0)
    assert targets[half].tolist().count(0) == targets[half].tolist().count(1) == 2
    assert targets[quarter].sort().values.tolist() == [0, 1]
    assert targets[rest].sort().values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"`val_fraction` to be a fraction in \[0, 1\), but got 1\.0"),
        ({"test_fraction": -0.1}, r"`test_fraction` to be a fraction in \[0, 1\), but got -0\.1"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "`val_fraction` and `test_fraction` to sum to less than 1, but got 0.5 and 0.5",
        ),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
        ({"batch_size": 0}, "`batch_size` to be an integer of at least 1, but got 0"),
        ({"num_workers": -1}, "`num_workers` to be an integer of at least 0, but got -1"),
    ],
)
def test_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**options)


def fit_one_epoch(model, datamodule):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=datamodule)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(model, datamodule=datamodule, verbose=False)
    return metrics | {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("model", "learnt"),
    [(MLPClassifier, 0.9), (lambda: ConvClassifier(learning_rate=1e-2), 0.8)],
    ids=["mlp", "conv"],
)
def test_one_epoch_teaches_most_digits(model, learnt):
    metrics = fit_one_epoch(model(), DigitsDataModule(batch_size=32))
    for phase in ("val", "test"):
        assert metrics[f"{phase}_accuracy"] > learnt
        error = 100 * (1 - metrics[f"{phase}_accuracy"])
        assert metrics[f"{phase}_error"] == pytest.approx(error, abs=1e-3)


def test_empty_validation_split_trains_without_validation():
    metrics = fit_one_epoch(MLPClassifier(hidden_size=8), DigitsDataModule(val_fraction=0.0))
    assert "val_accuracy" not in metrics
    assert "test_accuracy" in metrics
