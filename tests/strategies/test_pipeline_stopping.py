"""However a fit is ended, every stage ends it after the same batch, and none waits for the others before."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from fits import CLASSES, AtBatchEnd, Net, loader, net
from lightning.pytorch.callbacks import Timer
from processes import ReplicaError
from strategies.staged_fits import fit_staged, on_stages, staged, staged_trainer
from torch.nn import functional as F

BATCHES = 60


def many():
    return loader(rows=4 * BATCHES, batch_size=4)


def stops(at, rank, who):
    """Sets `should_stop` after batch `at` on the ranks `who`."""

    def action(trainer, module, batch_idx):
        if batch_idx == at and rank in who:
            trainer.should_stop = True

    return AtBatchEnd(action)


# ---- should_stop


def stopped(rank, stages, who, staleness, trainer):
    done = fit_staged(
        stages,
        train=many(),
        strategy=staged(stages, staleness=staleness),
        callbacks=[stops(5, rank, who)],
        **trainer,
    )
    return done.global_step, done.should_stop, done.fit_loop.batch_idx


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("who", [(0,), (1,), (2,), (0, 1, 2)])
def test_all_stages_stop_after_the_same_step(who, staleness):
    """Within the time in which a request comes down: two boundaries, `staleness + 1` batches each."""
    found = on_stages(stopped, 3, who, staleness, {}, stages=3)
    assert len(set(found)) == 1
    step, agreed, _ = found[0]
    assert agreed
    assert 6 < step <= 7 + 2 * (staleness + 1)


def test_a_request_has_the_same_effect_in_every_run():
    found = {tuple(on_stages(stopped, 3, (0,), 2, {}, stages=3)) for _ in range(3)}
    assert len(found) == 1


def test_a_request_of_the_first_stage_ends_the_next_batch():
    assert {step for step, *_ in on_stages(stopped, 2, (1,), 2, {})} == {7}


def test_a_request_comes_down_while_gradients_accumulate():
    found = on_stages(stopped, 2, (0,), 1, {"accumulate_grad_batches": 3})
    assert len(set(found)) == 1
    assert found[0][2] < 5 + 2 + 2 * 3


def test_min_steps_are_met_before_a_stop():
    assert {step for step, *_ in on_stages(stopped, 2, (0,), 0, {"min_steps": 40, "min_epochs": 0})} == {40}


class StopsIn(pl.Callback):
    """Sets `should_stop` in a hook."""

    def __init__(self, hook):
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        trainer.should_stop = not trainer.sanity_checking


HOOKS = {"on_train_start": 0, "on_validation_end": 4, "on_validation_batch_end": 4, "on_train_epoch_end": 10}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_stop_between_batches_takes_effect_at_once(hook):
    def body(rank):
        calls = [StopsIn(hook)] if rank == 1 else []
        every = {"val_check_interval": 4 if "validation" in hook else 10}
        return fit_staged(val=loader(16), max_epochs=3, callbacks=calls, **every).global_step

    assert on_stages(body) == 2 * [HOOKS[hook]]


# ---- time limits


def timed(rank, options):
    step = AtBatchEnd(lambda *_: time.sleep(0.02))
    done = fit_staged(train=loader(8000), callbacks=[step, *options.pop("callbacks", [])], **options)
    return done.global_step


@pytest.mark.parametrize(
    "options",
    [{"max_time": timedelta(seconds=1)}, {"callbacks": [Timer(timedelta(seconds=1), interval="step")]}],
    ids=["max_time", "Timer"],
)
def test_a_time_limit_ends_all_stages_after_the_same_step(options):
    steps = on_stages(timed, options)
    assert steps[0] == steps[1]
    assert 0 < steps[0] < 1000


class Measured(Net):
    """Logs what in several processes of equals would be put together in every batch."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES, dist_sync_on_step=True)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.cross_entropy(out, batch[1])
        self.accuracy(out, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


def ahead(rank, make, options):
    """Whether the first stage comes to the end of batch 8 while the last one stays in batch 2."""
    there = Path("there")

    def action(trainer, module, batch_idx):
        if rank == 1 and batch_idx == 8:
            there.touch()
        until = time.monotonic() + 15
        while rank == 0 and batch_idx == 2 and not there.exists() and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(there.exists())

    seen = []
    strategy, callbacks = staged(staleness=12), [AtBatchEnd(action)]
    fit_staged(module=make(), train=loader(96), strategy=strategy, callbacks=callbacks, **options)
    return seen[2]


@pytest.mark.parametrize(
    ("make", "options"),
    [(net, {}), (net, {"max_time": timedelta(hours=1)}), (Measured, {"log_every_n_steps": 1})],
    ids=["plain", "max_time", "torchmetrics and sync_dist"],
)
def test_no_stage_waits_for_the_others_in_every_batch(make, options):
    last, _ = on_stages(ahead, make, options)
    assert last


# ---- SIGTERM


class Says(pl.Callback):
    """Sends this process a SIGTERM after batch 5, and writes down what ends the fit."""

    def __init__(self, rank, who):
        self.rank, self.who, self.said = rank, who, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 5 and self.rank in self.who:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)

    def on_exception(self, trainer, module, exception):
        self.said = type(exception).__name__
        trainer.save_checkpoint("end.ckpt")


def terminated(rank, who):
    says = Says(rank, who)
    trainer = staged_trainer(callbacks=[says])
    begun = time.monotonic()
    with pytest.raises(SystemExit):
        trainer.fit(net(), loader(8000))
    return says.said, trainer.global_step, time.monotonic() - begun < 30


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
def test_sigterm_ends_all_stages_after_the_same_step_as_lightning_does(who, tmp_path):
    found = on_stages(terminated, who)
    assert found[0] == found[1]
    said, step, in_time = found[0]
    assert (said, in_time) == ("SIGTERMException", True)
    assert step < 60
    state = torch.load(tmp_path / "end.ckpt")
    assert state["global_step"] == step


def test_sigterm_in_a_validation_ends_it():
    class Kills(pl.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
            self.last = batch_idx

    def body(rank):
        kills = Kills()
        trainer = staged_trainer(callbacks=[kills])
        with pytest.raises(SystemExit):
            trainer.fit(net(), loader(), loader(8000))
        return kills.last

    first, second = on_stages(body)
    assert first == second < 900


# ---- ends that all ranks come to by themselves


class Skips(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 and self.trainer.global_rank in self.ranks else None


def skipping(rank, ranks):
    torch.manual_seed(0)
    module = Skips()
    module.ranks = ranks
    return fit_staged(module=module, max_epochs=2).global_step


def test_an_epoch_is_ended_by_all_ranks():
    assert on_stages(skipping, (0, 1)) == [6, 6]


@pytest.mark.parametrize("ranks", [(0,), (1,)])
def test_an_epoch_that_one_rank_ends_is_an_error_on_all(ranks):
    with pytest.raises(ReplicaError) as caught:
        on_stages(skipping, ranks, seconds=30)
    assert str(caught.value).count("do on every rank") >= 2
    assert "hangs" not in str(caught.value)


LIMITS = {
    "limit_train_batches": ({"limit_train_batches": 4, "max_epochs": 2}, 8),
    "max_steps": ({"max_steps": 7, "max_epochs": -1}, 7),
    "overfit_batches": ({"overfit_batches": 3}, 3),
    "fast_dev_run": ({"fast_dev_run": 2}, 2),
    "sanity": ({"num_sanity_val_steps": 2}, 10),
    "val_check_interval": ({"val_check_interval": 0.3, "max_epochs": 2}, 20),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_trainers_limits_hold(limit):
    options, steps = LIMITS[limit]

    def body(rank):
        return fit_staged(val=loader(16), **options).global_step

    assert on_stages(body) == [steps, steps]


# ---- what waits for all is done by all


def test_a_checkpoint_that_one_rank_saves_alone_is_an_error_on_all():
    def body(rank):
        def save(trainer, module, batch_idx):
            if rank == 0 and batch_idx == 3:
                trainer.save_checkpoint(Path("alone.ckpt"))

        fit_staged(train=many(), callbacks=[AtBatchEnd(save)])

    with pytest.raises(ReplicaError) as caught:
        on_stages(body, seconds=30)
    assert str(caught.value).count("saving a checkpoint") >= 2
    assert "hangs" not in str(caught.value)


def test_nothing_of_the_agreement_stays_on_the_trainer():
    def body(rank):
        timer = Timer(timedelta(hours=1))
        timer.log = timer.log_dict = None  # Lightning's own, which stay
        trainer = staged_trainer(callbacks=[timer])
        loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer._signal_connector, timer)
        callbacks, before = list(trainer.callbacks), [set(vars(loop)) for loop in loops]
        trainer.fit(net(), loader())
        same = trainer.callbacks == callbacks
        return same, [name for o, names in zip(loops, before, strict=True) for name in set(vars(o)) - names]

    assert on_stages(body) == [(True, []), (True, [])]
