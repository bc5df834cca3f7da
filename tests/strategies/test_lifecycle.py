"""What a fit under DNIStrategy leaves behind, and the other things a Trainer does."""

import copy
import gc
import signal
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    BOUNDARIES,
    CLASSES,
    FEATURES,
    AtBatchEnd,
    AtBatchStart,
    BrokenError,
    Net,
    attributes,
    dataset,
    different,
    dni,
    fit,
    hooks_on,
    loader,
    net,
    quiet_trainer,
    weights,
)
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader

from lightning_dni.estimators import LocalLossEstimator, MLPEstimator, ZeroEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
LOCAL = partial(LocalLossEstimator, num_classes=CLASSES)
"""An estimator whose gradient is not zero at the first step."""


def first_batches(count):
    return loader(rows=8 * count)


# ---- what is left behind


def strike(where):
    """A module and callbacks that fail in the fifth batch, at `where`."""

    def action(trainer, module, batch_idx):
        if batch_idx == 4:
            raise KeyboardInterrupt if where == "keyboard" else BrokenError

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if where == "training_step" and batch_idx == 4:
                raise BrokenError
            return loss

        def on_after_backward(self):
            if where == "on_after_backward":
                raise BrokenError

    torch.manual_seed(0)
    at_end = [AtBatchEnd(action)] if where in ("callback", "keyboard") else []
    return Fails(), at_end


@pytest.mark.parametrize("where", ["training_step", "on_after_backward", "callback", "keyboard"])
def test_no_hook_is_left_after_a_fit_that_failed(where):
    # Lightning ignores further interrupts from then on: put the handler back
    handler = signal.getsignal(signal.SIGINT)
    module, callbacks = strike(where)
    before = attributes(module)
    strategy = dni(rng="stage")
    try:
        with pytest.raises((BrokenError, SystemExit)):
            fit(module, strategy, callbacks=callbacks)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert hooks_on(module) == 0
    assert attributes(module) == before
    module(torch.randn(2, FEATURES)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())  # backprop again, all the way


@pytest.mark.parametrize("bp_lambda", [0.0, 1.0])
def test_the_module_is_as_it_was_after_a_fit(bp_lambda):
    module = net()
    before = attributes(module)
    fit(module, dni(bp_lambda=bp_lambda), val=loader(16))
    assert hooks_on(module) == 0
    assert attributes(module) == before


def test_the_module_carries_nothing_of_ours_but_the_hooks_during_a_fit():
    module, during = net(), []
    before = attributes(module)
    look = AtBatchStart(lambda *_: during.append((attributes(module), hooks_on(module))))
    fit(module, dni(), callbacks=[look], max_epochs=2)
    # Lightning swaps configuration hooks into the module's own __dict__ while it runs
    assert {k: v for k, v in during[-1][0].items() if k} == {k: v for k, v in before.items() if k}
    assert {count for _, count in during} == {3}  # two boundaries and the output


def test_two_fits_of_one_trainer_go_on_with_the_estimators():
    module, strategy = net(), dni()
    trainer = fit(module, strategy)
    engine, built = strategy.engine, dict(strategy.engine.estimators)
    before = copy.deepcopy(built["net.0"].state_dict())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert strategy.engine is engine
    assert strategy.engine.estimators["net.0"] is built["net.0"]
    assert different(before, built["net.0"].state_dict())
    assert hooks_on(module) == 0


def test_a_second_fit_under_a_new_strategy_starts_with_new_estimators():
    module, one, other = net(), dni(), dni(boundaries=["net.1"])
    fit(module, one)
    fit(module, other)
    assert list(other.engine.estimators) == ["net.1"]
    assert other.engine.estimators["net.1"] is not one.engine.estimators["net.1"]
    assert hooks_on(module) == 0


def test_another_module_in_the_same_trainer_gets_an_engine_of_its_own():
    strategy = dni()
    trainer = fit(net(), strategy)
    first = strategy.engine
    trainer.fit_loop.max_epochs = 2
    other = net(seed=1)
    before = weights(other)
    trainer.fit(other, loader())
    assert strategy.engine is not first
    assert "net.0.0.weight" in different(before, weights(other))


def test_a_module_that_was_rebuilt_between_fits_is_cut_where_it_is_now():
    module, strategy = net(), dni()
    trainer = fit(module, strategy)
    module.net[0] = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert hooks_on(module) == 0


def test_a_failed_fit_leaves_no_half_window_to_the_estimators():
    """What was accumulated before the failure must not weigh in the next fit's first step."""

    def fail_once(trainer, module, batch_idx):
        if armed:
            armed.clear()
            raise BrokenError

    armed, strategy, straight = [True], dni(estimator=LOCAL), dni(estimator=LOCAL)
    trainer = quiet_trainer(strategy, callbacks=[AtBatchEnd(fail_once)], accumulate_grad_batches=2)
    module, twin = net(), net()
    with pytest.raises(BrokenError):
        trainer.fit(module, loader())
    trainer.fit(module, loader(16))
    fit(twin, straight, loader(16), accumulate_grad_batches=2)
    assert different(weights(module), weights(twin)) == []
    assert different(*(s.engine.estimators["net.0"].state_dict() for s in (strategy, straight))) == []


def test_a_step_of_the_optimizer_that_the_user_skips_is_skipped_by_the_estimators():
    """Lightning clears the skipped window's gradients; the estimators' must not live on to be added."""

    class SkipsFirst(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx == 0:
                closure()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)

    torch.manual_seed(0)
    plain_sgd = partial(torch.optim.SGD, lr=0.1)
    skipped, straight = (dni(estimator=LOCAL, estimator_optimizer=plain_sgd) for _ in range(2))
    fit(SkipsFirst(), skipped, loader(16))
    fit(net(), straight, DataLoader(torch.utils.data.Subset(dataset(), range(8, 16)), 8))
    for name, estimator in straight.engine.estimators.items():
        assert different(estimator.state_dict(), skipped.engine.estimators[name].state_dict()) == []


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_steps_hold_on_to_nothing():
    """No more tensors are alive after the tenth step than after the fifth (what others have left may go)."""
    counts = []

    def count(trainer, module, batch_idx):
        if batch_idx in (4, 9):
            counts.append(tensors_alive())

    fit(net(), dni(estimator=MLP), callbacks=[AtBatchEnd(count)])
    assert counts[1] <= counts[0]


def test_fits_hold_on_to_nothing():
    module = net()
    fit(module, dni())
    once = tensors_alive()
    fit(module, dni())
    fit(module, dni())
    assert tensors_alive() <= once


def test_a_copy_made_in_mid_fit_is_a_plain_module():
    copies = []
    take = AtBatchStart(lambda trainer, module, batch_idx: copies.append(copy.deepcopy(module)))
    fit(net(), dni(), first_batches(3), callbacks=[take])
    inside = []

    class Uses(pl.Callback):
        """A copy that runs during the original's fit is not cut either."""

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            twin = copy.deepcopy(module)
            twin(batch[0]).sum().backward()
            inside.append(all(p.grad is not None for p in twin.parameters()))

    fit(net(), dni(estimator=ZeroEstimator), first_batches(3), callbacks=[Uses()])
    assert inside == [True] * 3
    copies[-1](torch.randn(2, FEATURES)).sum().backward()
    assert all(p.grad is not None for p in copies[-1].parameters())


# ---- the other stages of a Trainer


def test_validate_test_and_predict_work_before_and_after_a_fit():
    def evaluate(trainer, module):
        results = trainer.validate(module, loader(), verbose=False) + trainer.test(
            module, loader(), verbose=False
        )
        return results, torch.cat(trainer.predict(module, loader()))

    got = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        module, trainer = net(), quiet_trainer(strategy)
        before = evaluate(trainer, module)
        torch.manual_seed(0)
        trainer.fit(module, loader())
        after = evaluate(trainer, module)
        assert hooks_on(module) == 0
        got.append((before, after))
    (plain_before, plain_after), (before, after) = got
    assert (before[0], after[0]) == (plain_before[0], plain_after[0])
    assert torch.equal(before[1], plain_before[1])
    assert torch.equal(after[1], plain_after[1])


def test_validation_inside_a_fit_is_not_cut_even_with_gradients_enabled():
    class Differentiates(Net):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                self(batch[0]).sum().backward()
            complete.append(all(p.grad is not None for p in self.parameters()))
            self.zero_grad()

    complete = []
    fit(Differentiates(), dni(estimator=ZeroEstimator), val=loader(16), val_check_interval=3)
    assert len(complete) > 6
    assert all(complete)


@pytest.mark.parametrize(
    "options",
    [{"fast_dev_run": True}, {"fast_dev_run": 3}, {"overfit_batches": 2}, {"num_sanity_val_steps": 1}],
    ids=str,
)
def test_the_trainers_short_runs_work(options):
    trainer = fit(net(), dni(), val=loader(16), **options)
    assert trainer.state.finished


def test_the_engine_is_not_there_before_a_fit():
    strategy = dni()
    with pytest.raises(AttributeError, match="DNIStrategy has no engine before `fit`"):
        _ = strategy.engine
    assert not hasattr(strategy, "engine")
    assert not hasattr(strategy, "estimators")


def test_the_estimators_of_a_fit_are_the_strategys():
    strategy = dni()
    fit(net(), strategy, fast_dev_run=True)
    assert list(strategy.estimators) == BOUNDARIES
    assert all(strategy.estimators[name] is made for name, made in strategy.engine.estimators.items())


class Tuned(pl.LightningDataModule):
    batch_size = 2

    def train_dataloader(self):
        return loader(rows=100, batch_size=self.batch_size)

    val_dataloader = train_dataloader


class WithRate(Net):
    def __init__(self):
        super().__init__()
        self.lr = 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    "finder",
    [
        pytest.param(partial(LearningRateFinder, num_training_steps=20), id="learning rate"),
        pytest.param(partial(BatchSizeFinder, steps_per_trial=1, max_trials=2), id="batch size"),
    ],
)
def test_lightnings_tuners_leave_the_estimators_as_they_were(finder):
    """They save before the first step, train, and restore: the estimators start afresh then."""
    at_start = []
    note = AtBatchStart(
        lambda trainer, module, batch_idx: at_start.append(
            [p.clone() for e in trainer.strategy.engine.estimators.values() for p in e.parameters()]
        )
    )
    strategy = dni(estimator=LOCAL)
    trainer = quiet_trainer(strategy, callbacks=[finder(), note])
    torch.manual_seed(0)
    trainer.fit(WithRate(), datamodule=Tuned())
    assert len(at_start) == trainer.global_step
    assert not any(bool(p.any()) for p in at_start[0])
    assert any(bool(p.any()) for p in at_start[2])
