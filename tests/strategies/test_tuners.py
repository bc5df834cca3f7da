"""Lightning's finders train, look and restore: they find what they find without us, and leave no trace."""

import lightning.pytorch as pl
import pytest
import torch
from fits import Net, different, dni, loader, quiet_trainer, weights
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from strategies.loops import MLP
from strategies.resuming import NoisyEstimator, assert_same_state, state_of


class WithRate(Net):
    def __init__(self, lr=0.1, **options):
        super().__init__(**options)
        self.lr, self.batch_size = lr, 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self):
        return loader(rows=40, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(rows=8)


class FindsLater(LearningRateFinder):
    """Looks again before the second epoch, and leaves the rate as it is."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


def made(**options):
    torch.manual_seed(0)
    return WithRate(**options)


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_lambda_one_tunes_and_trains_as_the_plain_trainer(tune):
    found = []
    for strategy in ("auto", dni(bp_lambda=1.0, estimator=MLP)):
        module, trainer = made(), quiet_trainer(strategy, max_epochs=2)
        tuner = Tuner(trainer)
        if tune == "lr_find":
            finder = tuner.lr_find(module, num_training=30, early_stop_threshold=None)
            found.append((finder.results, finder.suggestion()))
        else:
            found.append(tuner.scale_batch_size(module, steps_per_trial=2, max_trials=3))
        torch.manual_seed(0)
        trainer.fit(module)
        found.append((weights(module), module.lr, module.batch_size))
    plain, plain_end, ours, ours_end = found
    assert plain == ours
    assert plain_end[1:] == ours_end[1:]
    assert different(plain_end[0], ours_end[0]) == []


def run(callbacks=(), batch_size=8, strategy=None, **options):
    module = made(dropout=0.3)
    module.batch_size = batch_size
    strategy = strategy or dni(rng="stage", estimator=NoisyEstimator)
    trainer = quiet_trainer(strategy, callbacks=list(callbacks), max_epochs=2, **options)
    torch.manual_seed(0)
    trainer.fit(module)
    return module.batch_size, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("finder", [LearningRateFinder, FindsLater], ids=["at first", "in mid-fit"])
def test_looking_for_a_rate_leaves_estimators_their_optimizer_and_every_stream_where_they_were(
    finder, accumulate
):
    looks, options = [], {"accumulate_grad_batches": accumulate}
    for strategy in ("auto", None):
        looks.append(finder(num_training_steps=12, update_attr=False))
        _, with_it = run(looks[-1:], strategy=strategy, **options)
        _, without = run(strategy=strategy, **options)
        if with_it.global_step != without.global_step and strategy == "auto":
            pytest.skip("this Lightning's finder costs a fit two of its steps, without us too")
    # in mid-fit Lightning 2.6 restores, but trains nothing there
    plain, ours = (bool(look.optimal_lr.results["loss"]) for look in looks)
    assert plain == ours
    assert ours or finder is FindsLater
    assert_same_state(state_of(without), state_of(with_it))


def test_looking_for_a_batch_size_leaves_them_where_they_were_too():
    found, with_it = run([BatchSizeFinder(steps_per_trial=3, max_trials=1, init_val=2)])
    _, without = run(batch_size=found)
    assert found < 8
    assert_same_state(state_of(without), state_of(with_it))


class Fails(WithRate):
    broken = True

    def training_step(self, batch, batch_idx):
        if self.broken and self.global_step == 5:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def failed_finder(strategy):
    """The module, and whether the finder has left it where it was (Lightning 2.5 does not)."""
    torch.manual_seed(0)
    module = Fails()
    before = weights(module)
    with pytest.raises(ZeroDivisionError):
        Tuner(quiet_trainer(strategy)).lr_find(module, num_training=15)
    return module, different(before, weights(module)) == []


def test_a_finder_that_fails_leaves_module_and_trainer_usable():
    module, restored = failed_finder(dni())
    assert restored == failed_finder("auto")[1]
    module.broken = False
    twin = made()
    twin.load_state_dict(module.state_dict())
    for one in (module, twin):
        torch.manual_seed(0)
        quiet_trainer(dni()).fit(one)
    assert different(weights(module), weights(twin)) == []


def test_an_epoch_of_another_data_module_after_tuning():
    """A data module tunes its own batch size; the fit after it is the plain Trainer's at lambda one."""

    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return loader(rows=64, batch_size=self.batch_size)

        def val_dataloader(self):
            return loader(rows=8)

    ends = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        module, data = made(dropout=0.2), Data()
        trainer = quiet_trainer(strategy, callbacks=[BatchSizeFinder(steps_per_trial=2, max_trials=2)])
        torch.manual_seed(0)
        trainer.fit(module, datamodule=data)
        ends.append((weights(module), data.batch_size, trainer.global_step))
    assert ends[0][1:] == ends[1][1:]
    assert different(ends[0][0], ends[1][0]) == []
