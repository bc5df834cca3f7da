"""GradientMonitor in real fits, against a twin that trains and measures by plain backprop."""

import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from callbacks.runs import AGGREGATES, KEYS, SPEED, csv_rows, rows_with
from callbacks.twin import Twin
from fits import BOUNDARIES, CLASSES, OPTIMIZERS, AtBatchEnd, Net, different, dni, fit, loader, net, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dni.callbacks import GradientMonitor
from lightning_dni.core import DNIEngine, HasEngine, Observable, StepReport
from lightning_dni.core.report import Utilization
from lightning_dni.demos import DigitsDataModule, MLPClassifier
from lightning_dni.estimators import LocalLossEstimator, ZeroEstimator


def monitored(every_n=2, module=None, strategy=None, monitor=None, **options):
    """Fit with a monitor; returns its rows by step, the monitor and the module."""
    module = net() if module is None else module
    monitor = monitor or GradientMonitor(every_n_train_steps=every_n)
    options = {"log_every_n_steps": every_n, "logger": CSVLogger("."), **options}
    callbacks = [monitor, *options.pop("callbacks", [])]
    fit(module, strategy or dni(), callbacks=callbacks, **options)
    return csv_rows(options["logger"]) if options["logger"] else {}, monitor, module


def dni_part(row):
    return {key: value for key, value in row.items() if key.startswith("dni_") and key not in SPEED}


# ---- values


@pytest.mark.parametrize(("every_n", "accumulate"), [(1, 1), (3, 1), (3, 2)])
def test_every_key_equals_the_twins(every_n, accumulate):
    module = net()
    twin = Twin(module.net, CLASSES, OPTIMIZERS["sgd"])
    options = {"accumulate_grad_batches": accumulate, "train": loader(batch_size=8 // accumulate)}
    rows, monitor, module = monitored(every_n, module, precision="64-true", **options)
    measured = [twin.step(*batch) for batch in loader(batch_size=8)]
    assert rows_with(rows, "dni_mean_cosine") == list(range(every_n - 1, 10, every_n))
    for step in rows_with(rows, "dni_mean_cosine"):
        expected = {
            f"{metric}/{name.replace('.', '_')}": value
            for name, found in zip(BOUNDARIES, measured[step], strict=True)
            for metric, value in found.items()
        }
        cosines = [found["dni_true_gradient_cosine"] for found in measured[step]]
        expected["dni_mean_cosine"] = sum(cosines) / 2
        expected["dni_worst_error"] = max(found["dni_sg_error"] for found in measured[step])
        assert dni_part(rows[step]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for probe in monitor.history:
        found = dict(zip(BOUNDARIES, measured[probe.step], strict=True))
        assert probe.cosine == pytest.approx({n: f["dni_true_gradient_cosine"] for n, f in found.items()})
        assert probe.error == pytest.approx({n: f["dni_sg_error"] for n, f in found.items()})
    assert len(monitor.history) == 10 // every_n


def test_an_uneven_last_window_is_measured_as_far_as_it_goes():
    rows, _, _ = monitored(1, accumulate_grad_batches=4, train=loader(72, batch_size=8))
    assert rows_with(rows, "dni_mean_cosine") == [0, 1, 2]


def test_weights_are_compared_as_they_were_before_clipping():
    rows, _, _ = monitored(strategy=dni(bp_lambda=1.0), gradient_clip_val=1e-3)
    for step in (1, 9):
        for name in ("net_0", "net_1"):
            assert rows[step][f"dni_weight_error/{name}"] < 1e-6
            assert rows[step][f"dni_sg_error/{name}"] > 0.1


def test_local_losses_are_logged_raw():
    def local(spec):
        return LocalLossEstimator(spec, num_classes=CLASSES)

    rows, _, _ = monitored(1, strategy=dni(estimator=local), max_steps=1)
    assert rows[0]["dni_sg_loss/net_0"] == pytest.approx(math.log(CLASSES))  # a head of zeros


def test_estimators_that_learn_nothing_have_no_loss():
    rows, monitor, _ = monitored(strategy=dni(estimator=ZeroEstimator))
    assert not rows_with(rows, "dni_sg_loss/net_0")
    assert monitor.history[-1].error == dict.fromkeys(BOUNDARIES, 1.0)
    assert monitor.history[-1].cosine == dict.fromkeys(BOUNDARIES, 0.0)


def test_skipped_updates_are_counted_in_every_row():
    def poison(trainer, module, batch_idx):
        if batch_idx == 5:
            torch.nn.init.constant_(trainer.strategy.engine.estimators["net.1"].map.bias, float("nan"))

    rows, _, _ = monitored(strategy=dni(on_nonfinite="skip"), callbacks=[AtBatchEnd(poison)])
    counts = {step: (row["dni_skipped/net_0"], row["dni_skipped/net_1"]) for step, row in rows.items()}
    assert counts == {1: (0, 0), 3: (0, 0), 5: (0, 0), 7: (2, 2), 9: (4, 4)}
    rows, _, _ = monitored()
    assert not any(key.startswith("dni_skipped") for row in rows.values() for key in row)


def test_without_probe_only_the_target_is_compared():
    rows, monitor, _ = monitored(monitor=GradientMonitor(2, probe=False))
    names = {key.partition("/")[0] for key in dni_part(rows[3])}
    assert names == {"dni_sg_loss", "dni_target_error", "dni_target_cosine"}
    assert monitor.history == []
    assert not list(Path().rglob("dni_gradients.png"))


# ---- rows


def test_every_key_arrives_in_every_row_and_nowhere_else():
    rows, _, _ = monitored(4, log_every_n_steps=2)
    assert rows_with(rows, "loss") == [1, 3, 5, 7, 9]
    for key in [*KEYS, *AGGREGATES, *SPEED]:
        assert rows_with(rows, key) == [3, 7], key
    assert {k for k in rows[3] if k.startswith("dni_")} == {*KEYS, *AGGREGATES, *SPEED}


def test_rows_that_lightning_would_drop_are_announced_once():
    match = r"measures steps at which Trainer\(log_every_n_steps=3\) writes no row"
    with pytest.warns(UserWarning, match=match) as caught:
        rows, monitor, _ = monitored(2, log_every_n_steps=3)
    assert sum("writes no row" in str(w.message) for w in caught) == 1
    assert rows_with(rows, "dni_mean_cosine") == [5]  # rather no row than one of another step
    assert [probe.step for probe in monitor.history] == [1, 3, 5, 7, 9]


def test_values_stay_available_to_other_callbacks():
    checkpoint = ModelCheckpoint(monitor="dni_mean_cosine", mode="max", every_n_train_steps=1, save_top_k=1)
    _, monitor, _ = monitored(2, callbacks=[checkpoint], enable_checkpointing=True)
    best = max(sum(p.cosine.values()) / 2 for p in monitor.history)
    assert checkpoint.best_model_score.item() == pytest.approx(best)


def test_speed_is_that_of_the_steps_between_probes():
    rows, _, _ = monitored(5, train=loader(batch_size=8))
    for step in (4, 9):
        row = rows[step]
        assert 0 < row["dni_step_time"] < 1
        assert row["dni_samples_per_second"] == pytest.approx(8 / row["dni_step_time"], rel=1e-4)
        assert row["dni_peak_memory"] > 2**20
    every_step, _, _ = monitored(1, logger=CSVLogger(".", name="every"))
    assert rows_with(every_step, "dni_step_time") == []  # every step was a probe
    assert rows_with(every_step, "dni_peak_memory") == list(range(10))


# ---- what it must not do


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_training_is_the_same_bits_with_and_without(options):
    def run(callbacks):
        module, strategy = net(dropout=0.2, batch_norm=True), dni()
        fit(module, strategy, loader(shuffle=True), loader(16), callbacks=callbacks, max_epochs=2, **options)
        return weights(module), {n: weights(e) for n, e in strategy.engine.estimators.items()}

    plain, watched = run([]), run([GradientMonitor(3)])
    assert different(plain[0], watched[0]) == []
    assert all(different(plain[1][name], watched[1][name]) == [] for name in BOUNDARIES)


class Touched(TorchDispatchMode):
    """Counts what is done to tensors inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Touched.count += 1
        return function(*args, **(kwargs or {}))


class Watched(GradientMonitor):
    """Counts what the monitor does to tensors in its hooks, by step."""

    def on_train_start(self, *args):
        super().on_train_start(*args)
        self.touches = {}

    def on_train_batch_start(self, trainer, *args):
        with self._counted(trainer.global_step):
            super().on_train_batch_start(trainer, *args)

    def on_train_batch_end(self, trainer, *args):
        with self._counted(trainer.global_step - 1):
            super().on_train_batch_end(trainer, *args)

    def _counted(self, step):
        return _Counted(self.touches, step)


class _Counted(Touched):
    def __init__(self, touches, step):
        super().__init__()
        self.touches, self.step = touches, step

    def __exit__(self, *args):
        self.touches[self.step] = self.touches.get(self.step, 0) + Touched.count
        Touched.count = 0
        return super().__exit__(*args)


def test_no_tensor_is_touched_on_other_steps():
    _, monitor, _ = monitored(monitor=Watched(4), log_every_n_steps=4)
    touched = [step for step, count in monitor.touches.items() if count]
    assert touched == [3, 7]


def test_a_step_without_loss_is_no_measurement():
    class Moody(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    rows, monitor, _ = monitored(2, Moody())
    assert [probe.step for probe in monitor.history] == [3, 5, 7, 9]
    assert rows_with(rows, "dni_mean_cosine") == [3, 5, 7, 9]


# ---- configuration


def test_every_logger_gets_the_configuration():
    loggers = [CSVLogger(".", name="one"), CSVLogger(".", name="two")]
    monitor = GradientMonitor(2, recipe="digits_dni")
    fit(net(), dni(bp_lambda={"net.0": 0.5, "*": 0.0}), callbacks=[monitor], logger=loggers)
    for logger in loggers:
        found = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())["dni"]
        assert found["boundaries"] == BOUNDARIES
        assert found["estimators"] == {"net_0": "LinearEstimator", "net_1": "LinearEstimator"}
        assert found["estimator_parameters"] == {"net_0": 8 * 8 + 8 + 3 * 8, "net_1": 8 * 8 + 8 + 3 * 8}
        assert found["optimizer"] == {"name": "SGD", "lr": 0.1}
        assert found["estimator_optimizer"] == {"name": "Adam", "lr": 1e-3}
        assert found["bp_lambda"] == {"net_0": 0.5, "net_1": 0.0}
        assert found["staleness"] == 0
        assert isinstance(found["seed"], int)
        assert found["recipe"] == "digits_dni"
        assert torch.__version__.startswith(found["versions"]["torch"])
        assert found["versions"].keys() == {"lightning_dni", "torch", "lightning", "python"}


def test_rates_of_several_groups_are_all_there_as_configured():
    class Groups(Net):
        def configure_optimizers(self):
            below, above = list(self.net[0].parameters()), list(self.net[1:].parameters())
            optimizer = torch.optim.SGD([{"params": below, "lr": 0.1}, {"params": above, "lr": 0.2}])
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)]

    logger = CSVLogger(".")
    monitored(2, Groups(), logger=logger)
    found = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())["dni"]
    assert found["optimizer"] == {"name": "SGD", "lr": [0.1, 0.2]}


# ---- the picture


def test_picture_is_written_beside_the_logs_and_announced(caplog):
    logger = CSVLogger(".")
    with caplog.at_level(logging.INFO):
        monitored(2, logger=logger)
    path = Path(logger.log_dir) / "dni_gradients.png"
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert any(str(path) in record.getMessage() for record in caplog.records)


def test_picture_without_logger_lies_in_the_root_directory(tmp_path):
    monitored(2, logger=False, default_root_dir=tmp_path / "root")
    assert (tmp_path / "root" / "dni_gradients.png").exists()


def test_a_fit_too_short_to_measure_says_so():
    with pytest.warns(UserWarning, match=r"measured nothing: fit ended at step 10, .* every 50th"):
        fit(net(), dni(), callbacks=[GradientMonitor()])


# ---- resuming


def test_history_is_resumed_and_continued():
    epoch = {"train": loader(40), "logger": False}  # 5 steps
    whole = monitored(2, max_epochs=2, **epoch)[1].history
    fit(net(), dni(), epoch["train"], callbacks=[GradientMonitor(2)]).save_checkpoint("half.ckpt")
    saved = torch.load("half.ckpt", weights_only=True)["callbacks"]["GradientMonitor"]
    assert [probe["step"] for probe in saved["history"]] == [1, 3]
    logger = CSVLogger(".")
    options = {"logger": logger, "ckpt_path": "half.ckpt", "max_epochs": 2}
    resumed = monitored(2, net(1), **{**epoch, **options})[1]
    assert resumed.history == whole
    assert rows_with(csv_rows(logger), "dni_mean_cosine") == [5, 7, 9]


# ---- refusals


@pytest.mark.parametrize("every_n", [0, -1, True])
def test_bad_period_is_refused(every_n):
    with pytest.raises(ValueError, match=r"Expected `every_n_train_steps` to be an integer of at least 1"):
        GradientMonitor(every_n_train_steps=every_n)


def test_strategy_without_engine_is_refused_by_name():
    match = r"for GradientMonitor, but got SingleDeviceStrategy, .*Pass Trainer\(strategy=DNIStrategy"
    with pytest.raises(MisconfigurationException, match=match):
        fit(net(), callbacks=[GradientMonitor()])


def test_monitor_sees_the_strategy_through_protocols_only():
    strategy = dni()
    fit(net(), strategy, max_steps=1)
    assert isinstance(strategy, HasEngine)
    assert isinstance(strategy.engine, Observable)


# ---- real data


def test_digits_with_validation(tmp_path):
    torch.manual_seed(0)
    module, logger = MLPClassifier(hidden_size=32, num_hidden=2), CSVLogger(".")
    strategy = dni(boundaries=["net.hidden_*"], estimator=lambda spec: LocalLossEstimator(spec, 10))
    monitor = GradientMonitor(10)
    options = {"log_every_n_steps": 10, "logger": logger, "max_epochs": 2, "callbacks": [monitor]}
    fit(module, strategy, DigitsDataModule(), **options)
    rows = csv_rows(logger)
    assert rows_with(rows, "dni_sg_error/net_hidden_0") == [9, 19, 29, 39]
    assert len(rows_with(rows, "val_error")) == 2
    assert rows[39]["dni_mean_cosine"] > 0.05


# ---- stages in other processes


class TellsTime(DNIEngine):
    """As if it were the last of two stages of which none has synthetic gradients."""

    report_delay = 1

    @property
    def last_report(self):
        spent = [Utilization(busy=3.0, wait_in=2.0, wait_out=1.0, whole=10.0 * self._steps) for _ in range(2)]
        return StepReport(self._steps, False, {}, {}, dict(enumerate(spent)))


def test_shares_of_time_are_of_the_time_between_two_rows(monkeypatch):
    monkeypatch.setattr("lightning_dni.strategies.decoupled.DNIEngine", TellsTime)
    rows, monitor, _ = monitored(5)
    assert rows_with(rows, "dni_busy/stage_1") == [4, 9]
    found = {key: value for key, value in rows[4].items() if "/stage_" in key}
    shares = {"dni_busy": 3 / 50, "dni_wait_in": 2 / 50, "dni_wait_out": 1 / 50}
    assert found == pytest.approx({f"{what}/stage_{k}": v for what, v in shares.items() for k in range(2)})
    assert rows[9]["dni_busy/stage_0"] == 0.0  # no work was added since, but 50 seconds
    assert monitor.history == []
    assert rows[9]["dni_step_time"] > 0
