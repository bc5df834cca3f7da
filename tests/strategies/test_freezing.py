"""Stages that are frozen pay for no estimator; thawed in mid-fit they get theirs then."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import AtBatchEnd, AtBatchStart, Net, different, dni, fit, hooks_on, loader, net, weights
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from strategies.loops import ADAM, HandLoop, assert_plain, assert_twins, by_hand, double, linear_dni
from strategies.resuming import assert_same_state, leaves
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LocalLossEstimator

FLOAT64 = {"precision": "64-true"}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def frozen(module, stage=0):
    module.net[stage].requires_grad_(False)
    return module


class Thaw(pl.Callback):
    """Thaws `stage` before the first batch of `epoch`, or freezes it."""

    def __init__(self, epoch, stage=0, requires_grad=True):
        self.epoch, self.stage, self.requires_grad = epoch, stage, requires_grad

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            module.net[self.stage].requires_grad_(self.requires_grad)


def upper_loop(stages, optimizer):
    """The loop over the stages above a frozen first one."""
    return HandLoop(stages[1:], optimizer)


def below(stages, batches):
    return [(stages[0](x).detach(), y) for x, y in batches]


def grown(stages, upper):
    """The loop over all stages that goes on from the one over the upper ones."""
    loop = HandLoop(stages, upper.user)
    loop.maps[1], loop.teachers[1] = upper.maps[0], upper.teachers[0]
    return loop


# ---- frozen all the time


def test_a_frozen_first_stage_pays_for_no_estimator_and_the_rest_trains_as_by_hand():
    module, strategy, train = frozen(net()), linear_dni(), loader()
    stages = by_hand(module)
    loop = upper_loop(stages, SGD(stages.parameters()))
    for batch in 3 * below(stages, double(train)):
        loop.window([batch])
    before = weights(module)
    fit(module, strategy, train, max_epochs=3, **FLOAT64)
    assert list(strategy.engine.estimators) == ["net.1"]
    for name, weight in stages.state_dict().items():
        torch.testing.assert_close(weights(module)[f"net.{name}"].double(), weight, rtol=0, atol=1e-10)
    assert different(before, weights(module)) == [n for n in before if not n.startswith("net.0")]
    assert all(p.grad is None for p in module.net[0].parameters())


def test_every_stage_below_the_top_frozen_is_a_linear_probe():
    """Nothing to cut: the top trains on the true gradient, as under the plain Trainer."""
    module = frozen(frozen(net(dropout=0.3)), stage=1)
    ends = []
    for strategy in ("auto", linear_dni()):
        twin = copy.deepcopy(module)
        fit(twin, strategy, max_epochs=2)
        ends.append(weights(twin))
    assert different(*ends) == []
    assert strategy.engine.estimators == {}


def test_a_frozen_middle_stage_still_hands_a_target_down():
    module, strategy, train = frozen(net(), stage=1), linear_dni(), loader()
    stages = by_hand(module)
    loop = HandLoop(stages, SGD(stages.parameters()))
    for batch in 3 * double(train):
        loop.window([batch])
    fit(module, strategy, train, max_epochs=3, **FLOAT64)
    assert list(strategy.engine.estimators) == ["net.0", "net.1"]
    assert_twins(module, strategy, loop)


@pytest.mark.parametrize("stage", [0, 1])
def test_lambda_one_is_plain_while_a_stage_is_frozen(stage):
    assert_plain(frozen(net(dropout=0.3, batch_norm=True), stage), max_epochs=2)


# ---- thawed and frozen in mid-fit


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_stage_that_thaws_gets_its_estimator_then_and_trains_as_by_hand(accumulate):
    module, strategy, train = frozen(net()), linear_dni(), loader()
    stages = by_hand(module)
    upper = upper_loop(stages, SGD(stages.parameters()))
    batches = double(train)

    def windows(made):
        return [made[i : i + accumulate] for i in range(0, len(made), accumulate)]

    for window in 2 * windows(below(stages, batches)):
        upper.window(window, accumulate)
    for p in stages[0].parameters():
        p.requires_grad_(True)
    loop = grown(stages, upper)
    for window in 2 * windows(batches):
        loop.window(window, accumulate)
    built = []
    watch = AtBatchEnd(lambda trainer, module, i: built.append(len(trainer.strategy.engine.estimators)))
    fit(module, strategy, train, callbacks=[Thaw(2), watch], max_epochs=4, accumulate_grad_batches=accumulate,
        **FLOAT64)  # fmt: skip
    assert built == 20 * [1] + 20 * [2]
    assert_twins(module, strategy, loop)


def test_a_stage_that_is_frozen_in_mid_fit_stays_where_it_is_and_so_does_its_estimator():
    module, strategy, at = net(), dni(estimator=partial(LocalLossEstimator, num_classes=3)), []

    def note(trainer, module, batch_idx):
        estimator = trainer.strategy.engine.estimators.get("net.0")
        if trainer.current_epoch and batch_idx == 0:
            at.append((weights(module.net[0]), copy.deepcopy(estimator.state_dict())))

    freeze = Thaw(1, requires_grad=False)
    fit(module, strategy, callbacks=[freeze, AtBatchStart(note)], max_epochs=3)
    (weights_then, estimator_then), *_ = at
    assert different(weights_then, weights(module.net[0])) == []
    assert different(estimator_then, strategy.engine.estimators["net.0"].state_dict()) == []
    assert hooks_on(module) == 0


@pytest.mark.parametrize("change", [Thaw(1), Thaw(1, requires_grad=False)], ids=["thaw", "freeze"])
def test_lambda_one_is_plain_when_a_stage_thaws_or_freezes(change):
    module = frozen(net(dropout=0.3)) if change.requires_grad else net(dropout=0.3)
    assert_plain(module, callbacks=lambda: [copy.deepcopy(change)], max_epochs=3)


def test_lambda_one_is_plain_when_every_other_batch_freezes_a_stage():
    def alternate(trainer, module, batch_idx):
        module.net[0].requires_grad_(batch_idx % 2 == 0)

    assert_plain(net(dropout=0.3), callbacks=lambda: [AtBatchStart(alternate)], max_epochs=2)


class Finetuned(Net):
    @property
    def backbone(self):
        return self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_lightnings_finetuning_trains_as_by_hand():
    torch.manual_seed(0)
    module, strategy, train = Finetuned(), linear_dni(), loader()
    stages = by_hand(module)
    user = torch.optim.SGD(stages[1:].parameters(), lr=0.1)
    upper = upper_loop(stages, user)
    for batch in 2 * below(stages, double(train)):
        upper.window([batch])
    user.add_param_group({"params": list(stages[0].parameters()), "lr": 0.01})
    loop = grown(stages, upper)
    for epoch_lr in (0.01, 0.02):  # the callback doubles the rate with every epoch
        user.param_groups[1]["lr"] = epoch_lr
        for batch in double(train):
            loop.window([batch])
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    fit(module, strategy, train, callbacks=[thaw], max_epochs=4, **FLOAT64)
    assert_twins(module, strategy, loop)


# ---- and resumed


@pytest.mark.parametrize("saved_after", [0, 1, 2], ids=["before", "at", "after"])
def test_a_run_in_which_a_stage_thaws_is_resumed_bit_for_bit(tmp_path, saved_after):
    """Thaws in epoch 2: the checkpoint before has no estimator of it, the one after has."""
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    ends = []
    for path in (None, tmp_path / f"epoch={saved_after}.ckpt"):
        module, strategy = frozen(net(seed=0 if path is None else 5)), linear_dni()
        if saved_after == 2 and path is not None:
            module.net[0].requires_grad_(True)  # requires_grad is no part of a checkpoint
        callbacks = [Thaw(2), *([keep] if path is None else [])]
        options = {"enable_checkpointing": True} if path is None else {}
        fit(module, strategy, callbacks=callbacks, max_epochs=4, ckpt_path=path, **options)
        made = strategy.engine.state_dict()
        ends.append((weights(module), made["estimators"], made["optimizers"]))
    (one, here, teachers), (other, there, teachers_there) = ends
    assert different(one, other) == []
    assert list(here) == list(there) == ["net.1", "net.0"]
    for name in here:
        assert different(here[name], there[name]) == []
    assert_same_state(leaves(teachers), leaves(teachers_there))


# ---- trained layer by layer


class Layerwise(Net):
    """The stages below `active` run without gradients, as where a user trains layer by layer."""

    active = 1

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for stage in self.net[: self.active]:
                x = stage(x)
        for stage in self.net[self.active :]:
            x = stage(x)
        return F.cross_entropy(x, y)


def test_a_stage_run_without_gradients_on_the_way_to_the_loss_is_refused_by_name():
    """The hook is quiet there: an engine that let it pass could not tell it from a boundary it missed."""
    torch.manual_seed(0)
    with pytest.raises(BoundaryError, match=r"Expected every boundary to run.*\['net\.0'\] did not"):
        fit(Layerwise(), linear_dni())


def test_a_thawed_module_of_another_kind_is_cut_as_well():
    """A stage swapped for a fresh one between two fits of one Trainer gets gradients, by hand and here."""
    module, strategy = (
        net(),
        dni(estimator=partial(LocalLossEstimator, num_classes=3), estimator_optimizer=ADAM),
    )
    trainer = fit(module, strategy)
    module.net[2] = nn.Linear(8, 3)
    before = weights(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert different(before, weights(module)) == list(before)
