"""RepresentationMonitor in real fits: what it measures, what it leaves alone, and where it refuses."""

import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from callbacks.runs import csv_rows, read_run
from ddp_fits import ddp, fit_on_rank, trainers
from fits import CLASSES, FEATURES, Net, different, dni, fit, loader, net, quiet_trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from processes import ReplicaError
from torch import nn
from torch.utils.data import DataLoader

from lightning_dni import DNIPipelineStrategy
from lightning_dni.analysis import (
    class_block_distances,
    dissimilarity,
    fit_probe,
    layer_outputs,
    weight_norm_profile,
    weight_norm_slope,
)
from lightning_dni.callbacks import RepresentationMonitor
from lightning_dni.callbacks.layers import resolve_layers
from lightning_dni.callbacks.representation_report import COLUMNS, draw_dissimilarities
from lightning_dni.demos import MLPClassifier

STRATEGIES = {"backprop": lambda: "auto", "dni": dni}


def monitored(monitor=None, strategy="auto", module=None, val=None, **options):
    """Fit with a monitor of 12 samples in the matrices and 30 for the probes."""
    monitor = monitor or RepresentationMonitor(num_samples=12, num_probed=30)
    module = net(dropout=0.3, batch_norm=True) if module is None else module
    trainer = fit(module, strategy, val=loader(40) if val is None else val, callbacks=[monitor], **options)
    return monitor, module, trainer


def rows_of_validation(size):
    inputs, labels = zip(*loader(40), strict=True)
    return torch.cat(inputs)[:size], torch.cat(labels)[:size]


# ---- values


@pytest.mark.parametrize("penalty", [1e-3, 10.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_curves_are_those_of_the_trained_model_on_the_first_rows(strategy, penalty):
    monitor = RepresentationMonitor(num_samples=12, num_probed=30, penalty=penalty)
    monitor, module, trainer = monitored(monitor, STRATEGIES[strategy]())
    inputs, labels = rows_of_validation(30)
    layers = {f"net.{k}": module.net[k] for k in range(3)}
    rows = layer_outputs(module, layers, inputs)
    order = torch.sort(labels[:12], stable=True).indices
    matrices = {name: dissimilarity(found[order]) for name, found in rows.items()}
    probes = {name: fit_probe(found[0::2], labels[0::2], penalty=penalty) for name, found in rows.items()}
    (found,) = monitor.history
    assert found.step == trainer.global_step == 10
    assert found.layers == tuple(layers)
    assert list(monitor.matrices) == list(layers)
    assert all(torch.equal(monitor.matrices[name], matrices[name]) for name in layers)
    assert (
        list(found.distance.values())
        == class_block_distances(list(matrices.values()), labels[order]).tolist()
    )
    assert found.weight_norm == weight_norm_profile(layers)
    for accuracy, first in ((found.train_accuracy, 0), (found.test_accuracy, 1)):
        expected = {n: p.accuracy(rows[n][first::2], labels[first::2]) for n, p in probes.items()}
        assert accuracy == expected


def test_given_samples_are_measured_as_those_of_validation():
    given, taken = (
        RepresentationMonitor(samples=samples, num_samples=12, num_probed=20)
        for samples in (rows_of_validation(20), None)
    )
    for monitor in (given, taken):
        fit(net(), dni(), val=loader(40), callbacks=[monitor], limit_train_batches=2)
    assert given.history == taken.history
    assert len(given.history) == 1


def test_given_samples_need_no_validation():
    given = RepresentationMonitor(samples=rows_of_validation(20), num_samples=12, num_probed=0)
    fit(net(), dni(), callbacks=[given], max_steps=1)
    assert [found.step for found in given.history] == [1]


def test_samples_are_seen_once_though_the_sanity_check_sees_some_before():
    monitor, _, _ = monitored(RepresentationMonitor(num_samples=40, num_probed=0), num_sanity_val_steps=2)
    inputs, labels = monitor._samples.joint()
    expected = rows_of_validation(40)
    assert torch.equal(inputs, expected[0])
    assert torch.equal(labels, expected[1])
    assert monitor.history[0].train_accuracy == {}


def test_a_diverged_layer_is_measured_as_no_number():
    module = net(optimizer="sgd")
    monitor = RepresentationMonitor(num_samples=12, num_probed=12)

    class Break(pl.Callback):
        def on_train_end(self, trainer, module):
            nn.init.constant_(module.net[1][0].weight, torch.inf)

    fit(module, val=loader(40), callbacks=[Break(), monitor])
    accuracy = monitor.history[0].test_accuracy
    assert accuracy["net.0"] == accuracy["net.0"]
    assert accuracy["net.2"] != accuracy["net.2"]


# ---- it changes nothing


class Drawing(Net):
    """Draws random numbers in validation and counts its calls."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 0 * torch.rand(())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_bit_of_a_run_is_as_without_it(strategy):
    def run(callbacks):
        torch.manual_seed(0)
        module = Drawing()
        module.net[1][1].eval()  # a frozen batch norm stays one
        val = loader(40, shuffle=True)
        fit(module, STRATEGIES[strategy](), loader(shuffle=True), val, max_epochs=2, callbacks=callbacks)
        flags = [m.training for m in module.modules()]
        return weights(module), flags, torch.get_rng_state()

    monitor = RepresentationMonitor(num_samples=12, num_probed=20, every_n_epochs=1)
    (with_it, flags, state), (without, other_flags, other_state) = run([monitor]), run([])
    assert len(monitor.history) == 2
    assert different(with_it, without) == []
    assert flags == other_flags
    assert torch.equal(state, other_state)


# ---- when


def test_it_measures_every_n_epochs_and_at_the_end_but_not_twice():
    monitor = RepresentationMonitor(num_samples=12, num_probed=0, every_n_epochs=2)
    monitored(monitor, max_epochs=3)
    assert [found.step for found in monitor.history] == [20, 30]
    monitor = RepresentationMonitor(num_samples=12, num_probed=0, every_n_epochs=2)
    monitored(monitor, max_epochs=2)
    assert [found.step for found in monitor.history] == [20]


def test_without_a_validation_before_it_says_so():
    monitor = RepresentationMonitor(num_samples=12, num_probed=0, every_n_epochs=1)
    with pytest.warns(UserWarning, match="RepresentationMonitor has measured nothing: no validation has run"):
        monitored(monitor, max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    assert [found.step for found in monitor.history] == [20]


def test_curves_go_on_from_a_checkpoint():
    monitor, module, trainer = monitored(max_epochs=1)
    trainer.save_checkpoint("last.ckpt")
    resumed = RepresentationMonitor(num_samples=12, num_probed=30)
    fit(module, val=loader(40), callbacks=[resumed], max_epochs=2, ckpt_path="last.ckpt")
    assert [found.step for found in resumed.history] == [10, 20]
    assert resumed.history[0] == monitor.history[0]


# ---- which layers


def names_of(model, patterns=None, boundaries=()):
    return list(resolve_layers(model, patterns, boundaries))


def test_layers_are_what_is_beside_the_boundaries():
    model = MLPClassifier(num_hidden=3, mark_middle=True)
    beside = ["net.hidden_0", "net.hidden_1", "net.hidden_2", "net.output"]
    assert names_of(model) == beside
    assert names_of(model, boundaries=["net.hidden_1"]) == beside
    assert names_of(model, boundaries=["net.middle"]) == [beside[0], "net.middle", *beside[1:]]
    assert names_of(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), boundaries=["1"]) == [
        "0",
        "1",
        "2",
    ]
    assert names_of(nn.Linear(1, 1)) == []


def test_layers_are_named_by_patterns():
    model = MLPClassifier(num_hidden=2)
    assert names_of(model, ["net.output", "net.hidden_*"]) == ["net.hidden_0", "net.hidden_1", "net.output"]
    assert names_of(model, ["net.hidden_1.0"]) == ["net.hidden_1.0"]
    with pytest.raises(
        MisconfigurationException, match=r"Expected `layers` to name .* but got 'net\.hiden_\*'"
    ):
        names_of(model, ["net.hiden_*"])


# ---- where it goes


def test_picture_goes_into_the_log_directory():
    logger = CSVLogger(".")
    monitor, _, _ = monitored(logger=logger, max_epochs=1)
    path = Path(logger.log_dir) / "dni_representations_step_10.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    row = {key: value for key, value in csv_rows(logger)[9].items() if key.startswith("dni_layer")}
    curves = ("distance", "train_accuracy", "test_accuracy", "weight_norm")
    assert list(row) == sorted(f"dni_layer_{curve}/net_{k}" for curve in curves for k in range(3))
    (found,) = monitor.history
    assert row["dni_layer_distance/net_1"] == pytest.approx(found.distance["net.1"])
    assert row["dni_layer_weight_norm/net_2"] == pytest.approx(found.weight_norm["net.2"])


def test_wandb_gets_picture_and_table():
    import wandb

    logger = WandbLogger(project="p", offline=True, save_dir=Path.cwd())  # W&B's service may run elsewhere
    monitor, _, _ = monitored(strategy=dni(), logger=logger)
    folder = Path(logger.experiment.settings.sync_dir)
    file = logger.experiment.settings.sync_file
    wandb.finish()
    (row,) = [row for row in read_run(file).by_step().values() if "dni_representations.path" in row]
    assert row["dni_representations._type"] == "image-file"
    assert (row["dni_layers._type"], row["dni_layers.nrows"]) == ("table-file", 3)
    assert row["trainer/global_step"] == 9
    (table,) = (folder / "files/media/table").glob("dni_layers*.table.json")
    written = json.loads(table.read_text())
    assert written["columns"] == list(COLUMNS)
    assert written["data"] == monitor.history[0].rows(["net.0", "net.1"])
    assert not list(Path().rglob("dni_representations_step_*.png"))


def test_a_boundary_between_two_layers_is_marked_in_table_and_picture(monkeypatch):
    drawn = {}

    def keep(matrices, cuts):
        drawn["cuts"] = cuts
        return draw_dissimilarities(matrices, cuts)

    monkeypatch.setattr("lightning_dni.callbacks.representations.draw_dissimilarities", keep)
    logger = CSVLogger(".")
    module = MLPClassifier(
        input_size=FEATURES, hidden_size=4, num_hidden=3, num_classes=CLASSES, mark_middle=True
    )
    monitor = RepresentationMonitor(["net.hidden_*"], num_samples=12, num_probed=0)
    strategy = dni(boundaries=["net.middle"])
    fit(module, strategy, val=loader(40), callbacks=[monitor], logger=logger, max_epochs=1)
    assert drawn["cuts"] == ("net.hidden_0",)
    assert (Path(logger.log_dir) / "dni_dissimilarities_step_10.png").stat().st_size > 1000
    assert [row[:2] for row in monitor.history[0].rows(drawn["cuts"])] == [
        ["net.hidden_0", True],
        ["net.hidden_1", False],
        ["net.hidden_2", False],
    ]
    row = csv_rows(logger)[9]
    slope = weight_norm_slope({f"hidden_{k}": module.net.get_submodule(f"hidden_{k}") for k in range(3)})
    assert row["dni_norm_slope"] == pytest.approx(slope)
    assert row["dni_norm_slope_sign"] == (1 if slope > 0 else -1)


# ---- several processes


def in_two_processes(rank, measures):
    monitor = RepresentationMonitor(num_samples=12, num_probed=12, every_n_epochs=1)
    logger = CSVLogger(".")
    options = {"val": loader(40), "max_epochs": 2, "logger": logger}
    module, _ = fit_on_rank(rank, ddp(), callbacks=[monitor] * measures, **options)
    return weights(module), len(monitor.history), len(list(Path().rglob("dni_representations_step_*.png")))


def test_in_two_processes_the_first_one_measures():
    (first, measured, pictures), (second, nothing, _) = trainers(partial(in_two_processes, measures=True))
    assert (measured, nothing, pictures) == (2, 0, 2)
    assert different(first, second) == []
    (without, _, _), _ = trainers(partial(in_two_processes, measures=False))
    assert different(first, without) == []


def in_a_pipeline(rank):
    strategy = DNIPipelineStrategy(boundaries=["net.0"], estimator=dni()._options.estimator)
    fit_on_rank(rank, strategy, train=loader(), val=loader(40), callbacks=[RepresentationMonitor()])


def test_a_pipeline_refuses_it():
    with pytest.raises(ReplicaError, match="but got DNIPipelineStrategy, which trains it in parts"):
        trainers(in_a_pipeline)


# ---- what it refuses


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 1}, "Expected `num_samples` to be an integer of at least 2, but got 1"),
        ({"num_probed": -1}, "Expected `num_probed` to be an integer of at least 0, but got -1"),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be an integer of at least 1, but got 0"),
        ({"penalty": 0}, "Expected `penalty` to be above 0 and finite, but got 0"),
        ({"penalty": float("nan")}, "Expected `penalty` to be above 0 and finite, but got nan"),
        ({"every_n_epochs": True}, "Expected `every_n_epochs` to be an integer of at least 1, but got True"),
    ],
)
def test_numbers_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        RepresentationMonitor(**options)


@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        (
            (torch.zeros(2, 3), torch.zeros(2)),
            r"a tuple of \(2, 3\) of torch.float32, \(2,\) of torch.float32",
        ),
        ((torch.zeros(2, 3), torch.zeros(3).long()), r"a tuple of \(2, 3\) of torch.float32, \(3,\)"),
        ((torch.zeros(2, 3), -torch.ones(2).long()), r"a tuple of \(2, 3\) of torch.float32, \(2,\)"),
    ],
)
def test_samples_without_classes_are_refused(samples, kind):
    match = f"one of labels, a class from 0 on for each, but got {kind}"
    with pytest.raises(MisconfigurationException, match=match):
        RepresentationMonitor(samples=samples)


def test_validation_without_classes_is_refused():
    class Dicts(Net):
        def validation_step(self, batch, batch_idx):
            pass

    data = DataLoader([{"x": torch.zeros(4, FEATURES), "y": torch.zeros(4) % CLASSES}], batch_size=None)
    with pytest.raises(MisconfigurationException, match="for each, but validation reads a dict"):
        fit(Dicts(), val=data, callbacks=[RepresentationMonitor()])


def test_no_samples_at_all_are_refused():
    with pytest.raises(
        MisconfigurationException, match="Expected `samples`, or validation to take them from"
    ):
        fit(net(), callbacks=[RepresentationMonitor()])


def test_it_is_let_go_after_fit():
    monitor, module, _ = monitored()
    assert (monitor._layers, monitor._wandb) == ({}, None)
    quiet_trainer(callbacks=[monitor]).validate(module, loader(40), verbose=False)
    assert len(monitor.history) == 1
