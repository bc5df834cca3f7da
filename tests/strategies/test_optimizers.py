"""Optimizers of any make, made anew in mid-fit or stepped by hand: the estimators step when they do."""

import lightning.pytorch as pl
import pytest
import torch
from fits import OPTIMIZERS, Net, different, dni, fit, loader, weights
from strategies.loops import HandLoop, assert_plain, assert_twins, by_hand, double, linear_dni

FLOAT64 = {"precision": "64-true"}


def made(kind, **options):
    torch.manual_seed(0)
    return kind(**options)


def hand_loop(module):
    stages = by_hand(module)
    return HandLoop(stages, OPTIMIZERS["sgd"](stages.parameters()))


class Renews(pl.Callback):
    """Configures the optimizers anew before the second epoch, as where a model grows."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


def test_lambda_one_is_plain_where_the_optimizer_is_made_anew():
    assert_plain(made(Net, dropout=0.3), callbacks=lambda: [Renews()], max_epochs=2)


def test_the_estimators_step_with_an_optimizer_that_was_made_anew():
    module, strategy = made(Net), linear_dni()
    loop = hand_loop(module)
    for _ in range(2):
        loop.user = OPTIMIZERS["sgd"](loop.stages.parameters())
        for batch in double(loader()):
            loop.window([batch])
    fit(module, strategy, callbacks=[Renews()], max_epochs=2, **FLOAT64)
    assert_twins(module, strategy, loop)


class Delegates:
    """A wrapper around an optimizer with all that Lightning asks of one, and nothing else."""

    def __init__(self, base):
        self.base, self.param_groups, self.defaults, self.state = (
            base,
            base.param_groups,
            base.defaults,
            base.state,
        )

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class Wraps(Delegates, torch.optim.Optimizer):
    """The same as a subclass that never calls Optimizer.__init__, as wrappers in several libraries."""


class Duck(Net):
    def configure_optimizers(self):
        return Delegates(super().configure_optimizers())


class Wrapped(Net):
    def configure_optimizers(self):
        return Wraps(super().configure_optimizers())


@pytest.mark.parametrize("kind", [Duck, Wrapped])
def test_a_wrapper_that_lightning_takes_for_an_optimizer_trains(kind):
    assert_plain(made(kind, dropout=0.3))
    module, strategy = made(kind), linear_dni()
    loop = hand_loop(module)
    for batch in double(loader()):
        loop.window([batch])
    fit(module, strategy, **FLOAT64)
    assert_twins(module, strategy, loop)


class StepsByHand(Net):
    """Steps the optimizer itself, not Lightning's wrapper around it."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.step()


def test_lambda_one_is_plain_where_the_module_steps_the_optimizer_itself():
    assert_plain(made(StepsByHand, dropout=0.3))


def test_the_estimators_step_where_the_module_steps_the_optimizer_itself():
    module, strategy = made(StepsByHand), linear_dni()
    loop = hand_loop(module)
    for batch in double(loader()):
        loop.window([batch])
    fit(module, strategy, **FLOAT64)
    assert_twins(module, strategy, loop)


class WithoutOptimizer(Net):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("bp_lambda", [0.0, 1.0])
def test_a_fit_without_an_optimizer_moves_nothing(bp_lambda):
    module = made(WithoutOptimizer)
    before = weights(module)
    fit(module, dni(bp_lambda=bp_lambda))
    assert different(before, weights(module)) == []
