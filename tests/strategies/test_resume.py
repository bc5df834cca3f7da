"""A run that was stopped and goes on is the run that was not: in mid-epoch, and across strategies."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    AtBatchEnd,
    AtBatchStart,
    BrokenError,
    Net,
    different,
    dni,
    fit,
    loader,
    net,
    quiet_trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from strategies.loops import MLP, linear_dni
from strategies.resuming import Annealed, NoisyEstimator, Shuffled, assert_same_state, leaves, state_of
from versions import safe_loading

from lightning_dni import MLPInputEstimator
from lightning_dni.estimators import CriticEstimator, DelayedGradientEstimator, LocalLossEstimator


def annealed(seed=0, **options):
    torch.manual_seed(seed)
    return Annealed(**options)


def keep_all(folder, every=1):
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_train_steps=every, filename="{step}")


# ---- in mid-epoch


LOCAL = partial(LocalLossEstimator, num_classes=3, hidden_sizes=(8,))
KINDS = {
    "linear": {},
    "mlp": {"estimator": MLP},
    "local_loss": {"estimator": LOCAL},
    "critic": {"estimator": partial(CriticEstimator, num_classes=3)},
    "noisy": {"estimator": NoisyEstimator},
    "mixed": {"bp_lambda": 0.5},
    "sparse and immediate": {"update_probability": 0.5, "update": "immediate"},
    "scheduled": {
        "estimator": LOCAL,
        "estimator_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
        "estimator_clip_norm": 0.1,
    },
    "delayed": {"estimator": partial(DelayedGradientEstimator, delay=2)},
    "synthetic inputs": {
        "synthetic_inputs": partial(MLPInputEstimator, hidden_sizes=(8,)),
        "update_probability": 0.5,
        "input_optimizer": partial(torch.optim.Adam, lr=1e-2),
    },
    "several": {
        "estimator_steps": 2,
        "estimator_optimizer": {"net.0": torch.optim.Adam, "*": torch.optim.SGD},
    },
}


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        *((kind, 1) for kind in KINDS),
        ("noisy", 3),
        ("delayed", 3),
        ("synthetic inputs", 3),
        ("several", 3),
        ("scheduled", 3),
        ("sparse and immediate", 3),
    ],
)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(tmp_path, kind, accumulate):
    """With dropout, batch norm, a scheduler, a shuffling loader; nothing draws from the global generator."""
    module_options = {"dropout": 0.3, "batch_norm": True, "optimizer": "adam"}
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}

    def strategy():
        return dni(**{"rng": "stage", **KINDS[kind]})

    whole = fit(annealed(**module_options), strategy(), Shuffled(), callbacks=[keep_all(tmp_path)],
                enable_checkpointing=True, **options)  # fmt: skip
    expected = state_of(whole)
    for step in (3, whole.global_step - 1):
        torch.manual_seed(99)
        resumed = fit(annealed(seed=5, **module_options), strategy(), Shuffled(),
                      ckpt_path=tmp_path / f"step={step}.ckpt", **options)  # fmt: skip
        assert resumed.global_step == whole.global_step
        assert_same_state(state_of(resumed), expected)


def test_the_test_above_can_fail(tmp_path):
    """Guard: a stream that is not restored shows."""
    keep = keep_all(tmp_path)
    strategy = partial(dni, rng="stage", estimator=NoisyEstimator)
    whole = fit(net(), strategy(), Shuffled(), callbacks=[keep], enable_checkpointing=True)
    path = tmp_path / "step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_dni"]["streams"] = {}
    torch.save(checkpoint, path)
    resumed = fit(net(seed=5), strategy(), Shuffled(), ckpt_path=path)
    assert different(weights(whole.lightning_module), weights(resumed.lightning_module))


class SaveAt(pl.Callback):
    """Saves after a batch of the first epoch, wherever the window stands."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, self.batch):
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("train", [Shuffled, partial(loader, shuffle=True)], ids=["stateful", "stock"])
@pytest.mark.parametrize(("accumulate", "batch"), [(1, 4), (3, 5), (3, 4)], ids=str)
def test_lambda_one_resumes_as_the_plain_trainer_does(tmp_path, train, accumulate, batch):
    """What Lightning loses there (a half window, the place in a shuffled epoch) is lost alike."""
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    ends = []
    for name, make in {"auto": lambda: "auto", "ours": lambda: dni(bp_lambda=1.0, estimator=MLP)}.items():
        path = tmp_path / f"{name}.ckpt"
        fit(net(dropout=0.3), make(), train(), callbacks=[SaveAt(path, batch)], **options)
        resumed = fit(net(seed=5, dropout=0.3), make(), train(), ckpt_path=path, **options)
        ends.append(state_of(resumed, engine=False))
    assert_same_state(*ends)


@pytest.mark.parametrize("where", ["on_train_batch_start", "training_step"])
@pytest.mark.parametrize("rng", ["global", "stage"])
def test_a_run_goes_on_from_the_checkpoint_that_an_exception_left(tmp_path, where, rng):
    """Fails in the first batch of the second epoch, which is repeated on resuming."""
    armed = []

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if armed and where == "training_step" and self.current_epoch == 1:
                raise BrokenError
            return loss

        def on_train_batch_start(self, batch, batch_idx):
            if armed and where == "on_train_batch_start" and self.current_epoch == 1:
                raise BrokenError

    def made(seed):
        torch.manual_seed(seed)
        return Fails(dropout=0.3 if rng == "stage" else 0.0)

    strategy = partial(linear_dni, rng=rng)
    whole = fit(made(0), strategy(), max_epochs=3)
    armed.append(True)
    rescue = OnExceptionCheckpoint(tmp_path, "rescued")
    with pytest.raises(BrokenError):
        fit(made(0), strategy(), callbacks=[rescue], max_epochs=3, enable_checkpointing=True)
    armed.clear()
    resumed = fit(made(5), strategy(), ckpt_path=tmp_path / "rescued.ckpt", max_epochs=3)
    assert_same_state(state_of(resumed), state_of(whole))


# ---- four directions


def strategies(bp_lambda=1.0):
    return {"plain": lambda: "auto", "ours": lambda: dni(bp_lambda=bp_lambda, estimator=MLP)}


@pytest.mark.parametrize("then", ["plain", "ours"])
@pytest.mark.parametrize("now", ["plain", "ours"])
def test_at_lambda_one_any_strategy_goes_on_with_the_others_checkpoint(tmp_path, then, now):
    module = annealed(optimizer="adam")
    whole = fit(copy.deepcopy(module), "auto", Shuffled(), max_epochs=3)
    keep = keep_all(tmp_path)
    fit(module, strategies()[then](), Shuffled(), callbacks=[keep], enable_checkpointing=True, max_epochs=2)
    resumed = fit(annealed(seed=5, optimizer="adam"), strategies()[now](), Shuffled(), max_epochs=3,
                  ckpt_path=tmp_path / "step=14.ckpt")  # fmt: skip
    assert_same_state(state_of(resumed, engine=False), state_of(whole, engine=False))


def test_estimators_start_afresh_from_a_plain_checkpoint_as_in_a_fit_from_its_weights(tmp_path):
    fit(net(), "auto").save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="holds no gradient estimators .* they start afresh"):
        resumed = fit(net(seed=5), linear_dni(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    module = Net.load_from_checkpoint(tmp_path / "plain.ckpt", strict=True)
    optimizer = torch.load(tmp_path / "plain.ckpt", weights_only=True)["optimizer_states"][0]

    class Momentum(pl.Callback):
        def on_fit_start(self, trainer, module):
            trainer.optimizers[0].load_state_dict(optimizer)

    fresh = fit(module, linear_dni(), callbacks=[Momentum()])
    assert different(weights(module), weights(resumed.lightning_module)) == []
    ours, theirs = (t.strategy.engine.estimators["net.0"].state_dict() for t in (fresh, resumed))
    assert different(ours, theirs) == []


@pytest.mark.parametrize("path", ["best", "last"])
def test_best_and_last_are_found(tmp_path, path):
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True, save_top_k=1)
    whole = fit(net(), linear_dni(), loader(), loader(16), max_epochs=3)
    module = net()
    trainer = fit(module, linear_dni(), loader(), loader(16), callbacks=[keep], enable_checkpointing=True,
                  max_epochs=2)  # fmt: skip
    assert trainer.validate(module, loader(16), ckpt_path=path, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader(16), ckpt_path=path)
    assert_same_state(state_of(trainer), state_of(whole))


# ---- weights alone


def test_a_checkpoint_of_weights_alone_is_no_checkpoint_to_resume_as_without_us(tmp_path):
    said = []
    for name, strategy in strategies().items():
        keep = ModelCheckpoint(dirpath=tmp_path, filename=name, save_weights_only=True)
        fit(net(), strategy(), callbacks=[keep], enable_checkpointing=True)
        with pytest.raises(KeyError) as caught:
            fit(net(seed=5), strategy(), ckpt_path=tmp_path / f"{name}.ckpt")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "save_weights_only" in said[0]


def test_a_warm_start_from_weights_is_a_fit_of_those_weights(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="weights", save_weights_only=True)
    module = net(batch_norm=True)
    fit(module, dni(), callbacks=[keep], enable_checkpointing=True)
    loaded = Net.load_from_checkpoint(tmp_path / "weights.ckpt", strict=True, weights_only=True)
    by_state = net(seed=5, batch_norm=True)
    by_state.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])
    ends = []
    for start in (copy.deepcopy(module), loaded, by_state):
        fit(start, dni(), max_epochs=2)
        ends.append(weights(start))
    assert different(ends[0], ends[1]) == different(ends[0], ends[2]) == []


@safe_loading
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_resuming_may_insist_on_safe_loading(tmp_path, weights_only):
    strategy = partial(dni, estimator=NoisyEstimator, rng="stage")
    fit(annealed(), strategy()).save_checkpoint(tmp_path / "one.ckpt")
    trainer = quiet_trainer(strategy(), max_epochs=2)
    trainer.fit(annealed(seed=5), loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=weights_only)
    assert_same_state(state_of(trainer), state_of(fit(annealed(), strategy(), max_epochs=2)))


# ---- what a file says is what was there when it was asked for


class Slow(TorchCheckpointIO):
    """Writes only when the next step has been taken."""

    def __init__(self):
        self.go = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        while not self.go:
            pass
        super().save_checkpoint(checkpoint, path, storage_options)


def written_late(strategy, path):
    """The checkpoint, and weights and engine's state of the step in which it was asked for."""
    slow, then = Slow(), []

    def act(trainer, module, batch_idx):
        if batch_idx == 4:
            engine = getattr(trainer.strategy, "engine", None)
            then.append(weights(module))
            then.append(engine and copy.deepcopy(leaves(engine.state_dict())))
            trainer.save_checkpoint(path)
        if batch_idx == 7:
            slow.go.append(True)

    fit(net(), strategy, callbacks=[AtBatchEnd(act)], plugins=[AsyncCheckpointIO(slow)])
    return torch.load(path, weights_only=True), *then


def test_a_checkpoint_written_in_the_background_holds_the_estimators_of_its_step(tmp_path):
    plain, then, _ = written_late("auto", tmp_path / "plain.ckpt")
    if different(plain["state_dict"], then):
        pytest.skip("this Lightning writes in the background what weights are later, without us too")
    saved, then, engine = written_late(dni(), tmp_path / "late.ckpt")
    assert saved["global_step"] == 5
    assert different(saved["state_dict"], then) == []
    assert_same_state(leaves(saved["lightning_dni"]), engine)


def test_saving_changes_no_number_of_the_run(tmp_path):
    save = AtBatchStart(lambda trainer, module, batch_idx: trainer.save_checkpoint(tmp_path / "now.ckpt"))
    ends = []
    for callbacks in ([], [save]):
        module = net(dropout=0.3)
        trainer = fit(module, dni(estimator=NoisyEstimator), callbacks=callbacks, max_epochs=2)
        ends.append(state_of(trainer))
    assert_same_state(*ends)
