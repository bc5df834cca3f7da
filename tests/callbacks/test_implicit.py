"""ImplicitLossMonitor: curl and curvature by hand, pictures in W&B and in files, the run unchanged."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from callbacks.runs import csv_rows, read_run, rows_with
from fits import LINEAR, dni, fit, loader, net, weights
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni.analysis import GradientField, conservation
from lightning_dni.callbacks import ImplicitLossMonitor
from lightning_dni.estimators import LinearEstimator, MLPEstimator

LOSS = partial(F.cross_entropy, reduction="none")
KINDS = {"net.0": partial(MLPEstimator, hidden_sizes=(8,), num_classes=3), "net.1": LINEAR}


@pytest.fixture
def _own_run(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    yield
    wandb.finish()


class Flat(pl.LightningModule):
    """Two inputs, two hidden stages."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout)),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def flat(seed=0):
    torch.manual_seed(seed)
    return Flat()


def points(rows=80, classes=3):
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(rows) % classes), 8)


def test_rows_hold_curl_and_curvature_of_every_estimator_as_it_was_asked():
    logger, found = CSVLogger("."), {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 3:  # before the estimators of this step have learnt
                weight = trainer.strategy.engine.estimators["net.1"].map.weight.detach().double()
                skew, symmetric = (weight - weight.t()).norm(), (weight + weight.t()) / 2
                found["net.1"] = float(skew / weight.norm()), float(torch.linalg.eigvalsh(symmetric)[0])

    options = {"callbacks": [Watch(), ImplicitLossMonitor(4)], "logger": logger, "log_every_n_steps": 2}
    fit(net(), dni(estimator=KINDS), **options)
    rows = csv_rows(logger)
    for name in ("net_0", "net_1"):
        assert rows_with(rows, f"dni_curl/{name}") == [3, 7]
        assert rows_with(rows, f"dni_smallest_eigenvalue/{name}") == [3, 7]
    assert rows[3]["dni_curl/net_1"] == pytest.approx(found["net.1"][0], rel=1e-5)
    assert rows[3]["dni_smallest_eigenvalue/net_1"] == pytest.approx(found["net.1"][1], rel=1e-5)
    assert 0 < rows[7]["dni_curl/net_0"] <= 2
    assert not list(Path().rglob("*.png"))  # six inputs are no plane


def test_the_run_is_the_same_to_the_bit_with_pictures_and_without():
    plain, watched = flat(), flat()
    fit(plain, dni(estimator=KINDS), points())
    rng = torch.get_rng_state()
    fit(watched, dni(estimator=KINDS), points(), callbacks=[ImplicitLossMonitor(10, loss=LOSS, side=5)])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(t, weights(plain)[n]) for n, t in weights(watched).items())
    assert watched.net[0][1].running_mean.any()


@pytest.mark.usefixtures("_own_run")
def test_pictures_reach_wandb_and_files_and_correlations_the_rows():
    logger = WandbLogger(project="test", save_dir=Path.cwd(), offline=True)
    csv = CSVLogger(".")
    monitor = ImplicitLossMonitor(5, loss=LOSS, side=6)
    strategy = dni(boundaries=["net.1"], estimator=partial(LinearEstimator, num_classes=2))
    options = {"callbacks": [monitor], "logger": [logger, csv], "log_every_n_steps": 5}
    fit(flat(), strategy, points(classes=2), **options)
    file = logger.experiment.settings.sync_file
    wandb.finish()
    run, rows = read_run(file), csv_rows(csv)
    key = "dni_implicit_correlation/net_1"
    assert rows_with(rows, key) == [4, 9]
    assert -1 <= rows[9][key] <= 1
    images = [row for row in run.rows if "dni_implicit_loss.path" in row]
    assert [row["trainer/global_step"] for row in images] == [4, 9]
    files = Path(next(Path("wandb").glob("offline-run-*"))) / "files"
    assert all((files / row["dni_implicit_loss.path"]).read_bytes()[:4] == b"\x89PNG" for row in images)
    drawn = sorted(path.name for path in Path(csv.log_dir).glob("*.png"))
    assert drawn == ["dni_implicit_loss_4.png", "dni_implicit_loss_9.png"]


class Backwards(Flat):
    def forward(self, x):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Twice(Flat):
    """Its first stage runs twice in a forward pass."""

    def __init__(self):
        super().__init__(0.0)
        self.net[0] = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.net[1] = nn.Linear(2, 8)

    def forward(self, x):
        return self.net[2](self.net[1](self.net[0](self.net[0](x))))


@pytest.mark.parametrize(
    ("module", "train", "why"),
    [
        (net, loader, "the input has not two dimensions"),
        (Backwards, points, "Backwards has no `forward`"),
        (Twice, points, "Expected one tensor to cross each boundary once for a plane of inputs"),
    ],
)
def test_where_nothing_can_be_drawn_it_says_so_once_and_measures_on(module, train, why, capsys, caplog):
    caplog.set_level("INFO")
    logger = CSVLogger(".")
    options = {"logger": logger, "log_every_n_steps": 2}
    fit(module(), dni(), train(), callbacks=[ImplicitLossMonitor(2)], **options)
    said = caplog.text + capsys.readouterr().err
    assert said.count(f"draws no pictures: {why}") == 1
    assert rows_with(csv_rows(logger), "dni_curl/net_0") == [1, 3, 5, 7, 9]


def test_a_context_of_several_rows_is_cut_to_those_that_are_looked_at():
    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 1:
                seen["estimator"] = GradientField(trainer.strategy.engine.estimators["net.0"])
                with torch.no_grad():
                    seen["h"] = module.net[0](batch[0][:3])

    logger = CSVLogger(".")
    options = {"logger": logger, "log_every_n_steps": 2, "limit_train_batches": 2}
    callbacks = [Watch(), ImplicitLossMonitor(2, rows=3)]
    mlp = partial(MLPEstimator, hidden_sizes=(8,), num_classes=3, batch_norm=False)
    fit(net(), dni(estimator=mlp), callbacks=callbacks, **options)
    labels = next(iter(loader()))[1]
    batch = list(loader())[1]
    expected = conservation(seen["estimator"].jacobian(seen["h"], batch[1][:3]))
    row = csv_rows(logger)[1]
    assert row["dni_curl/net_0"] == pytest.approx(float(expected.curl), rel=1e-3)
    assert row["dni_smallest_eigenvalue/net_0"] == pytest.approx(
        float(expected.smallest_eigenvalue), rel=1e-3
    )
    assert len(labels) > 3
    assert np.isfinite(row["dni_curl/net_0"])
