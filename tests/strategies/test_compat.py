"""One canary per thing that Lightning does not promise: which name broke, and what of ours needs it."""

import ast
import inspect
import logging
import textwrap
import warnings

import lightning.pytorch as pl
import pytest
import torch
from fits import BrokenError, Net, fit, loader, net, quiet_trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning_utilities.core import rank_zero
from strategies import test_compat_stages
from torchmetrics import MeanMetric
from versions import newer_lightning

import lightning_dni.strategies
from lightning_dni.strategies import _compat

PUBLIC = {
    "lightning.pytorch",
    "lightning.fabric.plugins.CheckpointIO",
    "lightning.fabric.utilities.move_data_to_device",
    "lightning.pytorch.callbacks.Callback",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.StochasticWeightAveraging",
    "lightning.pytorch.callbacks.Timer",
    "lightning.pytorch.plugins.precision.MixedPrecision",
    "lightning.pytorch.profilers.PassThroughProfiler",
    "lightning.pytorch.profilers.Profiler",
    "lightning.pytorch.strategies.SingleDeviceStrategy",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.Strategy",
    "lightning.pytorch.utilities.types.STEP_OUTPUT",
}
"""What strategies may import from Lightning directly, because its documentation lists it for strategies."""


def lightning_names(source):
    """Every name that Python `source` imports from Lightning."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("lightning", "pytorch_lightning")}


# ---- one canary per name


def test_misconfiguration_exception_is_what_the_trainer_itself_raises():
    with pytest.raises(_compat.MisconfigurationException):
        pl.Trainer(accelerator="cpu", devices=0)


def test_rank_zero_warn_warns_the_user():
    with pytest.warns(UserWarning, match="mind the gap"):
        _compat.rank_zero_warn("mind the gap")


def test_precision_is_the_base_of_what_a_trainer_runs_with():
    for precision in ("32-true", "64-true", "bf16-mixed"):
        plugin = quiet_trainer(precision=precision).precision_plugin
        assert isinstance(plugin, _compat.Precision)
        assert plugin.precision == precision


def test_strategy_registry_is_where_a_trainer_looks_names_up():
    class Canary(SingleDeviceStrategy):
        def __init__(self):
            super().__init__("cpu")

    _compat.StrategyRegistry.register("dni_canary", Canary, description="canary", override=True)
    try:
        assert isinstance(quiet_trainer("dni_canary").strategy, Canary)
    finally:
        del _compat.StrategyRegistry["dni_canary"]


def test_trainer_fn_tells_a_fit_from_an_evaluation_when_a_strategy_is_set_up():
    seen = []

    class Canary(SingleDeviceStrategy):
        def setup(self, trainer):
            seen.append(trainer.state.fn)
            super().setup(trainer)

    trainer, module = quiet_trainer(Canary("cpu")), net()
    trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader())
    assert seen == [_compat.TrainerFn.VALIDATING, _compat.TrainerFn.FITTING]


def test_log_as_batch_has_what_is_logged_count_with_the_rows_of_that_batch():
    class Logs(type(net())):
        def training_step(self, batch, batch_idx):
            for value, part in ((1.0, batch[0][:6]), (4.0, batch[0][:3])):
                _compat.log_as_batch(self.trainer, part)
                self.log("twice", torch.tensor(value), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    metrics = fit(Logs(), train=loader(16)).callback_metrics
    assert (metrics["twice_step"], metrics["twice_epoch"]) == (4.0, 2.0)


def test_rank_zero_info_tells_the_user():
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    rank_zero.log.addHandler(handler)
    try:
        _compat.rank_zero_info("for your information")
    finally:
        rank_zero.log.removeHandler(handler)
    assert told == ["for your information"]


def test_say_device_moves_metrics_and_leaves_parameters():
    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.inner, self.metric = Net(), MeanMetric()

    module, there = Measured(), torch.device("meta")
    _compat.say_device(module, there)
    assert module.device == module.inner.device == module.metric.device == there
    assert module.metric.mean_value.is_meta
    assert not any(p.is_meta for p in module.parameters())


def test_move_data_to_device_reaches_what_is_nested():
    moved = _compat.move_data_to_device({0: [torch.ones(2), "text"]}, torch.device("meta"))
    assert moved[0][0].is_meta
    assert moved[0][1] == "text"


def test_training_data_is_what_was_given_to_fit_or_the_hook_returns():
    seen, given = [], loader()

    class Hooked(Net):
        def train_dataloader(self):
            return given

    class Canary(SingleDeviceStrategy):
        def setup(self, trainer):
            super().setup(trainer)
            seen.append(_compat.training_data(trainer))

    fit(net(), Canary("cpu"), given)
    quiet_trainer(Canary("cpu")).fit(Hooked())
    assert [each is given for each in seen] == [True, True]


def test_combined_loader_holds_its_loaders_as_they_were_given():
    given = {"one": loader(), "two": [loader()]}
    assert _compat.CombinedLoader(given).iterables is given


def test_prepared_runs_the_hooks_of_a_batch_in_the_order_of_a_fit():
    ran = []

    class Hooked(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            ran.append("before")
            return batch

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            ran.append(str(device))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            ran.append("after")
            return batch

    module = Hooked()
    trainer = fit(module, train=loader(8), precision="64-true")
    in_fit = list(ran)
    ran.clear()
    batch = _compat.prepared(module, next(iter(loader(8))), trainer.precision_plugin)
    assert ran == in_fit == ["before", "cpu", "after"]
    assert batch[0].dtype == torch.float64


# ---- behaviour that we lean on and that no name stands for


def events_of(record):
    """What a plain strategy is asked to do, in order, over a two-batch fit."""
    events = []

    def recorder(name):
        original = getattr(SingleDeviceStrategy, name)

        def method(self, *args, **kwargs):
            events.append(name)
            return original(self, *args, **kwargs)

        return method

    canary = type("Canary", (SingleDeviceStrategy,), {name: recorder(name) for name in record})
    return canary("cpu"), events


def test_gradients_are_zeroed_between_training_step_and_backward():
    strategy, events = events_of(["training_step", "backward", "optimizer_step"])

    class Zeroed(pl.Callback):
        def on_before_zero_grad(self, *_):
            events.append("zero_grad")

    fit(net(), strategy, loader(16), callbacks=[Zeroed()])
    assert events == 2 * ["optimizer_step", "training_step", "zero_grad", "backward"]


def test_weights_are_restored_before_setup_and_the_tuners_restore_after_it(tmp_path):
    fit(net()).save_checkpoint(tmp_path / "plain.ckpt")
    strategy, events = events_of(["load_model_state_dict", "setup", "load_optimizer_state_dict", "teardown"])
    fit(net(), strategy, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert events == ["load_model_state_dict", "setup", "load_optimizer_state_dict", "teardown"]


def test_teardown_follows_a_failure():
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise BrokenError

    strategy, events = events_of(["setup", "teardown"])
    with pytest.raises(BrokenError):
        fit(net(), strategy, callbacks=[Fails()])
    assert events == ["setup", "teardown"]


def test_strategy_backward_still_does_what_ours_repeats_around_the_merge():
    """DNIStrategy.backward spells these calls out: a sixth one must be repeated there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Strategy.backward)))
    calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    assert sorted(calls) == sorted(
        [
            "self.pre_backward",
            "self.precision_plugin.pre_backward",
            "self.precision_plugin.backward",
            "self.precision_plugin.post_backward",
            "self.post_backward",
        ]
    )


def test_a_trainer_assigns_devices_and_nodes_to_a_strategy_that_has_the_attributes():
    class Canary(SingleDeviceStrategy):
        parallel_devices = None
        num_nodes = None

    strategy = quiet_trainer(Canary("cpu"), devices=2, num_nodes=3).strategy
    assert (len(strategy.parallel_devices), strategy.num_nodes) == (2, 3)


def test_the_batch_comes_first_in_training_step():
    class Canary(SingleDeviceStrategy):
        def training_step(self, *args, **kwargs):
            assert isinstance(args[0][0], torch.Tensor)
            assert kwargs == {}
            return super().training_step(*args, **kwargs)

    assert fit(net(), Canary("cpu"), fast_dev_run=True).state.finished


def test_a_checkpoint_of_weights_alone_has_no_optimizer_states():
    seen = []

    class Canary(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            seen.append("optimizer_states" in checkpoint)
            super().save_checkpoint(checkpoint, filepath, storage_options)

    trainer = fit(net(), Canary("cpu"))
    trainer.save_checkpoint("whole.ckpt")
    trainer.save_checkpoint("weights.ckpt", weights_only=True)
    assert seen == [True, False]


def test_the_loss_is_divided_by_the_number_of_accumulated_batches_also_in_a_short_window():
    arrived = []

    class Canary(SingleDeviceStrategy):
        def backward(self, closure_loss, *args, **kwargs):
            arrived.append(closure_loss.item())
            return super().backward(closure_loss, *args, **kwargs)

    class One(type(net())):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum() * 0.0 + 1.0

    fit(One(), Canary("cpu"), loader(32), accumulate_grad_batches=3)
    assert arrived == pytest.approx([1 / 3] * 4)


@newer_lightning
def test_mute_saving_keeps_callbacks_from_saving_upon_an_exception(tmp_path):
    savers = [
        pl.callbacks.OnExceptionCheckpoint(tmp_path),
        pl.callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, save_on_train_epoch_end=True),
    ]
    others = [pl.callbacks.ModelCheckpoint(tmp_path)]
    muted, undo = _compat.mute_saving([*savers, *others])
    assert muted == ["OnExceptionCheckpoint", "ModelCheckpoint"]
    for callback in savers:  # without a Trainer it could not save
        callback.on_exception(None, None, ValueError())
    for take_back in undo:
        take_back()
    assert not any("on_exception" in vars(callback) for callback in [*savers, *others])


# ---- nothing else of Lightning is used


def test_no_other_file_of_the_strategies_imports_what_is_not_documented(pytestconfig):
    folder = pytestconfig.rootpath / "lightning_dni" / "strategies"
    files = [path for path in folder.glob("*.py") if path.name != "_compat.py"]
    assert len(files) >= 4
    used = {name for path in files for name in lightning_names(path.read_text())}
    assert used <= PUBLIC


def test_an_import_that_is_not_documented_would_be_seen():
    source = "from lightning.pytorch.trainer.states import TrainerFn\nimport torch"
    assert lightning_names(source) - PUBLIC == {"lightning.pytorch.trainer.states.TrainerFn"}


def test_every_name_of_the_file_has_a_canary():
    names = [*globals(), *vars(test_compat_stages)]
    tests = " ".join(name for name in names if name.startswith("test_")).replace("_", "")
    missing = [name for name in _compat.__all__ if name.replace("_", "").lower() not in tests]
    assert missing == []
    assert lightning_dni.strategies._compat is _compat


def test_importing_lightnings_names_warns_of_no_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in _compat.__all__:
            getattr(_compat, name)
