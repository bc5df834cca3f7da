"""One canary per thing that stages need of Lightning and torchmetrics and that neither promises."""

import os
import signal
from datetime import timedelta
from threading import Lock

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from fits import AtBatchEnd, Net, dataset, fit, loader, net, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from packaging.version import Version
from torch.utils.data import DataLoader
from versions import LIGHTNING

from lightning_dni.strategies import _compat


def test_replace_on_and_follow_change_one_object_and_take_it_back():
    one, other, called = Timer(), Timer(), []
    undo = _compat.follow(one, "time_elapsed", lambda: called.append("after"))
    assert one.time_elapsed() == other.time_elapsed() == 0
    assert called == ["after"]
    undo()
    _compat.replace_on(one, "time_elapsed", lambda: 5)()
    assert vars(one).keys() == vars(other).keys()


def test_follow_batches_sees_every_batch_validation_and_epoch():
    class Follows(pl.Callback):
        def setup(self, trainer, module, stage):
            ends = {name: (lambda name=name: seen.append(name)) for name in ("batch", "end", "epoch")}
            undo.extend(_compat.follow_batches(trainer, **ends))

        def on_validation_end(self, *_):
            seen.append("validated")

    seen, undo = [], []
    fit(net(), "auto", loader(16), loader(16), callbacks=[Follows()], num_sanity_val_steps=0)
    assert seen == ["batch", "end", "batch", "validated", "end", "epoch"]
    for back in undo:
        back()


def test_note_sigterm_notes_it_and_mark_sigterm_ends_the_fit_with_sigterm_exception():
    class Listens(pl.Callback):
        def setup(self, trainer, module, stage):
            if Version("2.6") <= LIGHTNING:  # older ones broadcast nothing
                assert callable(type(trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor)
            undo.extend(_compat.note_sigterm(trainer, lambda: noted.append(trainer.global_step)))

    def action(trainer, module, batch_idx):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if batch_idx == 3:
            assert not trainer.received_sigterm
            _compat.mark_sigterm(trainer)

    noted, undo = [], []
    trainer = quiet_trainer(callbacks=[Listens(), AtBatchEnd(action)])
    with pytest.raises(_compat.SIGTERMException):
        trainer.fit(net(), loader())
    assert noted == [2]
    assert trainer.global_step == 4
    assert issubclass(_compat.SIGTERMException, SystemExit)


def test_free_timer_asks_nobody():
    timer, expired = Timer(timedelta(seconds=0)), []
    undo = _compat.free_timer(timer, lambda: expired.append(True))
    timer.on_train_batch_end(None, None)
    assert expired == [True]
    assert len(undo) == 1
    assert _compat.free_timer(Timer(timedelta(1), interval="epoch"), expired.append) == []


def test_drop_logged_values_drops_them():
    class Drops(pl.Callback):
        def setup(self, trainer, module, stage):
            _compat.drop_logged_values(trainer)

    assert fit(net(), "auto", val=loader(16), callbacks=[Drops()]).callback_metrics == {}


def test_quiet_copy_logs_nothing_and_knows_its_trainer():
    module = net()
    trainer = fit(module, max_steps=1)
    logged = []
    twin = _compat.quiet_copy(module, lambda name, *value, **options: logged.append(name))
    twin.training_step((torch.zeros(2, 6), torch.zeros(2, dtype=torch.long)), 0)
    assert twin.trainer is trainer
    assert logged == ["loss"]
    assert "log" not in vars(module)


def test_quiet_copy_has_metrics_that_see_this_process_only():
    module = net()
    module.mean = torchmetrics.MeanMetric(process_group=Lock(), distributed_available_fn=lambda: True)
    twin = _compat.quiet_copy(module, print)
    assert twin.mean.process_group is None
    assert not twin.mean.distributed_available_fn()
    assert module.mean.process_group is not None
    assert module.mean.distributed_available_fn()


def test_quiet_copy_gathers_from_nobody():
    module = net()
    fit(module, max_steps=1)
    one, two = (_compat.quiet_copy(module, print, copies) for copies in (1, 2))
    assert one.all_gather({"x": 3})["x"].tolist() == 3
    assert two.all_gather({"x": torch.ones(1)}, sync_grads=True)["x"].tolist() == [[1.0], [1.0]]


def test_metrics_in_finds_them_at_any_depth():
    module, mean = net(), torchmetrics.MeanMetric()
    module.deep = torch.nn.ModuleDict({"metrics": torchmetrics.MetricCollection({"mean": mean})})
    (found,) = _compat.metrics_in(module)
    assert found is mean


def test_saves_at_step_knows_when_a_checkpoint_is_written():
    every = ModelCheckpoint("here", every_n_train_steps=3)
    assert [_compat.saves_at_step(every, step) for step in (2, 3, 4, 6)] == [False, True, False, True]
    assert not _compat.saves_at_step(ModelCheckpoint("here"), 3)
    assert not _compat.saves_at_step(Timer(), 3)


def test_waits_in_every_batch_and_validates_by_time_see_what_goes_by_the_clock():
    by_time = ModelCheckpoint("here", train_time_interval=timedelta(minutes=1))
    assert _compat.waits_in_every_batch(by_time)
    assert not _compat.waits_in_every_batch(ModelCheckpoint("here"))
    assert not _compat.validates_by_time(quiet_trainer(val_check_interval=0.5))
    if hasattr(quiet_trainer(), "_val_check_time_interval"):  # older Lightning takes no time
        assert _compat.validates_by_time(quiet_trainer(val_check_interval=timedelta(minutes=1)))


def test_metric_state_and_set_metric_state_move_what_a_metric_has_seen():
    one, other = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
    one.update(torch.tensor([1.0, 4.0]))
    other.update(torch.tensor(7.0))
    other.compute()
    _compat.set_metric_state(other, *_compat.metric_state(one))
    assert other.compute() == 2.5
    assert other.update_count == 1


def test_metric_state_is_that_of_all_processes_and_leaves_the_metric_alone():
    together = {"dist_sync_fn": lambda x, group: [x, x + 1], "distributed_available_fn": lambda: True}
    cat, total = torchmetrics.CatMetric(**together), torchmetrics.SumMetric(**together)
    own = torchmetrics.SumMetric(sync_on_compute=False, **together)
    for metric in (cat, total, own):
        metric.update(torch.tensor(3.0))
        metric.update(torch.tensor(5.0))
        held = metric.metric_state
        state, updates = _compat.metric_state(metric)
        assert all(metric.metric_state[name] is value for name, value in held.items())
        other = type(metric)()
        _compat.set_metric_state(other, state, updates)
        assert torch.equal(other.compute(), metric.compute())
        other.update(torch.tensor(0.0))
    assert (total.compute(), own.compute()) == (17.0, 8.0)
    total.sync(total.dist_sync_fn)
    assert _compat.metric_state(total)[0]["sum_value"] == 17.0


def test_worker_seeding_is_lightnings_own_for_rank_zero(monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert _compat.worker_seeding(0) is None
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    seen = []

    class Sees(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(trainer.train_dataloader.worker_init_fn)

    fit(Net(), train=DataLoader(dataset(), 8), callbacks=[Sees()])
    ours = _compat.worker_seeding(0)
    assert (ours.func, ours.keywords) == (seen[0].func, seen[0].keywords)


def test_clip_norms_by_is_what_a_trainer_clips_by():
    class Clips(pl.Callback):
        def setup(self, trainer, module, stage):
            _compat.clip_norms_by(trainer.precision_plugin, lambda *given: seen.append(given))

    torch.manual_seed(0)
    module, seen = Net(), []
    fit(module, train=loader(8), callbacks=[Clips()], gradient_clip_val=1.0)
    ((parameters, norm),) = seen
    assert [id(p) for p in parameters] == [id(p) for p in module.parameters()]
    assert norm == 1.0


def test_lightning_environment_is_what_a_trainer_has_where_nobody_else_starts_processes():
    strategy = quiet_trainer("ddp", devices=2).strategy
    assert isinstance(strategy.cluster_environment, _compat.LightningEnvironment)
    assert strategy.cluster_environment.main_address == "127.0.0.1"


def test_averaging_are_lightnings_own_callbacks():
    assert all(issubclass(kind, pl.Callback) for kind in _compat.AVERAGING)


def test_load_shards_reads_what_torch_has_written(tmp_path):
    tensors = {"stage 0: ['a.b'][1]": torch.ones(3), "b": torch.arange(4).view(2, 2)}
    torch.distributed.checkpoint.save(tensors, checkpoint_id=tmp_path)
    found = _compat.load_shards(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
