"""Callbacks, hooks and options of a Trainer: at lambda 1 as without us, at lambda 0 as by hand."""

import copy
import signal
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    FEATURES,
    OPTIMIZERS,
    AtBatchEnd,
    AtBatchStart,
    BrokenError,
    Net,
    different,
    dni,
    fit,
    hooks_on,
    loader,
    net,
    newer,
    quiet_trainer,
    weights,
)
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from strategies.loops import MLP, HandLoop, assert_plain, assert_twins, by_hand, double, epoch, linear_dni
from strategies.resuming import assert_same_state, state_of

from lightning_dni.estimators import LocalLossEstimator

FLOAT64 = {"precision": "64-true"}
LOCAL = partial(LocalLossEstimator, num_classes=3)


def hand_loop(module, optimizer="sgd"):
    stages = by_hand(module)
    return HandLoop(stages, OPTIMIZERS[optimizer](stages.parameters()))


def made(kind, **options):
    torch.manual_seed(0)
    return kind(**options)


# ---- stopping and choosing


def test_lambda_one_stops_early_and_keeps_the_best_as_the_plain_trainer(tmp_path):
    chosen = []

    def callbacks():
        keep = ModelCheckpoint(dirpath=tmp_path / str(len(chosen)), monitor="val_loss", save_top_k=2)
        stop = EarlyStopping("val_loss", patience=1, min_delta=0.02)
        chosen.append((keep, stop))
        return [keep, stop]

    module = net(dropout=0.5)
    val, options = partial(loader, 24), {"enable_checkpointing": True, "max_epochs": 12}
    ends = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        twin = copy.deepcopy(module)
        trainer = fit(twin, strategy, loader(shuffle=True), val(), callbacks=callbacks(), **options)
        keep, stop = chosen[-1]
        names = sorted(path.rpartition("/")[2] for path in keep.best_k_models)
        ends.append((trainer.current_epoch, stop.stopped_epoch, stop.best_score, names, weights(twin)))
    assert ends[0][:4] == ends[1][:4]
    assert 1 < ends[0][0] < 12
    assert different(ends[0][4], ends[1][4]) == []


def test_a_run_that_stops_early_ends_where_one_of_that_length_ends():
    stop = EarlyStopping("val_loss", stopping_threshold=1.08)
    module, strategy = net(), linear_dni()
    trainer = fit(module, strategy, val=loader(24), callbacks=[stop], max_epochs=20, **FLOAT64)
    assert 0 < trainer.current_epoch < 20
    loop = hand_loop(net())
    for batch in trainer.current_epoch * double(loader()):
        loop.window([batch])
    assert_twins(module, strategy, loop)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"fast_dev_run": 3}, 3), ({"max_steps": 7}, 7), ({"max_epochs": 3, "max_steps": 14}, 14)],
    ids=str,
)
def test_short_runs_take_the_steps_that_they_are_asked_for(options, steps):
    module, strategy = net(), linear_dni()
    loop = hand_loop(module)
    for batch in (2 * double(loader()))[:steps]:
        loop.window([batch])
    fit(module, strategy, val=loader(8), **{"max_epochs": -1, **options}, **FLOAT64)
    assert_twins(module, strategy, loop)


class EndsEarly(Net):
    """Skips the rest of the epoch from the fifth batch on, in the middle of a window of three."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 5 else None


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_that_the_user_ends_early_drops_a_half_window(accumulate):
    module, strategy = made(EndsEarly), linear_dni()
    loop = hand_loop(module)
    for window in 3 * epoch(accumulate, double(loader())[:5]):
        if len(window) == accumulate:
            loop.window(window, accumulate)
    fit(module, strategy, accumulate_grad_batches=accumulate, max_epochs=3, **FLOAT64)
    assert_twins(module, strategy, loop)


# ---- averages of weights


def test_stochastic_weight_averaging_averages_what_was_trained_by_hand():
    module, strategy = net(optimizer="adam").double(), linear_dni()  # Lightning averages in this precision
    loop, seen = hand_loop(module, "adam"), []
    for number in range(4):
        if number:
            seen.append(copy.deepcopy(loop.stages.state_dict()))
        for batch in double(loader()):
            loop.window([batch])
    with torch.no_grad():
        for name, weight in loop.stages.state_dict().items():
            weight.copy_(sum(one[name] for one in seen) / len(seen))
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    fit(module, strategy, callbacks=[swa], max_epochs=4, **FLOAT64)
    assert_twins(module, strategy, loop)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_epoch_that_only_counts_batch_norm_teaches_the_estimators_nothing(accumulate):
    at_epoch_end = []

    class Note(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            estimators = trainer.strategy.engine.estimators
            state = {f"{n}.{k}": v for n, e in estimators.items() for k, v in e.state_dict().items()}
            at_epoch_end.append((copy.deepcopy(state), {n: p.clone() for n, p in module.named_parameters()}))

    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    module = net(batch_norm=True)
    fit(module, dni(estimator=MLP), callbacks=[Note(), swa], max_epochs=4, accumulate_grad_batches=accumulate)
    assert len(at_epoch_end) == 5
    learnt = [n for n in different(at_epoch_end[-2][0], at_epoch_end[-1][0]) if "running" not in n]
    assert [n for n in learnt if not n.endswith("num_batches_tracked")] == []
    assert different(at_epoch_end[-1][1], dict(module.named_parameters())) == []


@pytest.mark.parametrize("averaging", [newer("EMAWeightAveraging")])
def test_an_exponential_average_is_that_of_the_hand_written_loop(averaging):
    module, strategy = net().double(), linear_dni()
    loop, average = hand_loop(module), None
    for batch in 2 * double(loader()):
        loop.window([batch])
        now = {n: t.clone() for n, t in loop.stages.state_dict().items()}
        average = now if average is None else {n: 0.9 * average[n] + 0.1 * now[n] for n in now}
    loop.stages.load_state_dict(average)
    fit(module, strategy, val=loader(8), callbacks=[averaging(decay=0.9)], max_epochs=2, **FLOAT64)
    assert_twins(module, strategy, loop)


@pytest.mark.parametrize("averaging", [newer("EMAWeightAveraging"), newer("WeightAveraging")])
def test_a_run_with_averaged_weights_is_resumed_bit_for_bit(tmp_path, averaging):
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    whole = fit(net(), dni(), callbacks=[averaging(), keep], enable_checkpointing=True, max_epochs=3)
    resumed = fit(
        net(seed=5), dni(), callbacks=[averaging()], ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=3
    )
    assert_same_state(state_of(resumed), state_of(whole))


# ---- hooks and options


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.current_epoch:
            self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="norm")


class OwnBackward(Net):
    def backward(self, loss):
        loss.backward(retain_graph=True)


class WarmUp(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 15)
        optimizer.step(closure=optimizer_closure)


class Noisy(Net):
    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn_like(p.grad), alpha=1e-3)


class Looks(Net):
    def on_after_backward(self):
        self.log("norm", sum(p.grad.norm() for p in self.parameters()))


class Late(Net):
    """Its layers are made when the strategy asks for them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = Net(**self.hparams).net


class Groups(Net):
    def configure_optimizers(self):
        groups = [{"params": self.net[i].parameters(), "lr": 0.1 / (i + 1)} for i in range(3)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        }


@pytest.mark.parametrize("kind", [OwnClipping, OwnBackward, WarmUp, Noisy, Looks, Late, Groups])
def test_lambda_one_is_plain_whatever_hook_the_module_has(kind):
    assert_plain(made(kind, dropout=0.3), max_epochs=2, accumulate_grad_batches=2)


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"inference_mode": False, "val_check_interval": 0.5},
        {"fast_dev_run": 2},
        {"overfit_batches": 3},
        {"limit_train_batches": 0.4},
        {"reload_dataloaders_every_n_epochs": 1},
        {"profiler": "simple"},
        {"min_steps": 15, "max_epochs": 1},
        {"check_val_every_n_epoch": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_lambda_one_is_plain_whatever_the_trainer_is_asked(options):
    ends = []
    for strategy in ("auto", dni(bp_lambda=1.0, estimator=MLP)):
        module = net(dropout=0.3)
        trainer = fit(module, strategy, loader(shuffle=True), loader(24), **{"max_epochs": 2, **options})
        ends.append((weights(module), trainer.global_step, trainer.callback_metrics))
    assert different(ends[0][0], ends[1][0]) == []
    assert ends[0][1:] == ends[1][1:]
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "callback",
    [
        partial(ModelPruning, "l1_unstructured", amount=0.3, parameter_names=["weight"]),
        partial(Timer, duration="00:01:00:00"),
        newer("WeightAveraging"),
    ],
)
def test_lambda_one_is_plain_beside_other_callbacks(callback):
    assert_plain(net(dropout=0.3), callbacks=lambda: [callback()], max_epochs=3)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_is_what_it_is_without_us_in_inference_mode_and_out_of_it(inference_mode):
    results = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        module, trainer = net(), quiet_trainer(strategy, inference_mode=inference_mode)
        torch.manual_seed(0)
        trainer.fit(module, loader(), loader(24))
        results.append(
            [
                trainer.validate(module, loader(24), verbose=False),
                trainer.test(module, loader(24), verbose=False),
                [scores.tolist() for scores in trainer.predict(module, loader(24))],
                [scores.is_inference() for scores in trainer.predict(module, loader(24))],
            ]
        )
    assert results[0] == results[1]


# ---- several fits, and fits that fail


def test_two_fits_of_one_trainer_are_the_hand_written_loop_with_a_new_optimizer():
    """Lightning configures the user's optimizer anew; the estimators and theirs go on."""
    module, strategy = net(), linear_dni()
    loop = hand_loop(module)
    for _ in range(2):
        loop.user = OPTIMIZERS["sgd"](loop.stages.parameters())
        for batch in double(loader()):
            loop.window([batch])
    trainer = fit(module, strategy, **FLOAT64)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert_twins(module, strategy, loop)


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["start", "end", "loss", "backward", "step"])
def test_after_a_failure_module_and_trainer_go_on_as_without_us(where, error):
    armed = []

    def strike(at):
        if at == where and armed:
            armed.clear()
            raise error

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 4:
                strike("loss")
            return loss

        def on_after_backward(self):
            strike("backward")

        def on_before_optimizer_step(self, optimizer):
            strike("step")

    handler, ends = signal.getsignal(signal.SIGINT), []
    start = AtBatchStart(lambda trainer, module, batch_idx: batch_idx == 4 and strike("start"))
    end = AtBatchEnd(lambda trainer, module, batch_idx: batch_idx == 4 and strike("end"))
    for strategy in ("auto", dni(bp_lambda=1.0, estimator=LOCAL)):
        armed.append(True)
        module = made(Fails, dropout=0.3)
        trainer = quiet_trainer(strategy, callbacks=[start, end], max_epochs=2, accumulate_grad_batches=2)
        torch.manual_seed(0)
        try:
            with pytest.raises((error, SystemExit)):
                trainer.fit(module, loader())
        finally:
            signal.signal(signal.SIGINT, handler)
        assert hooks_on(module) == 0
        torch.manual_seed(1)
        trainer.fit(module, loader())
        torch.manual_seed(2)
        ends.append((weights(module), trainer.global_step, module(torch.randn(3, FEATURES)).tolist()))
    assert different(ends[0][0], ends[1][0]) == []
    assert ends[0][1:] == ends[1][1:]
