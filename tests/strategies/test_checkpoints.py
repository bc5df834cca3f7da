"""Checkpoints written and read under DNIStrategy, and under others."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    BOUNDARIES,
    CLASSES,
    LINEAR,
    Net,
    different,
    dni,
    fit,
    hooks_on,
    loader,
    net,
    quiet_trainer,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dni import DNIStrategy
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import LocalLossEstimator, MLPEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
LOCAL = partial(LocalLossEstimator, num_classes=CLASSES)
"""An estimator whose gradient is not zero at the first step."""


# ---- checkpoints


def saved(tmp_path, module=None, strategy=None, name="run.ckpt", **options):
    """A checkpoint after one epoch; returns its path."""
    trainer = fit(net() if module is None else module, dni() if strategy is None else strategy, **options)
    path = tmp_path / name
    trainer.save_checkpoint(path)
    return path


def leaves(value):
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (*leaves(k), *leaves(v))]
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


def test_a_checkpoint_holds_us_under_one_key_in_tensors_and_primitives(tmp_path):
    path = saved(tmp_path, strategy=dni(estimator=MLP))
    plain = tmp_path / "plain.ckpt"
    fit(net()).save_checkpoint(plain)
    ours = torch.load(path, weights_only=True)
    assert set(ours) - set(torch.load(plain, weights_only=True)) == {"lightning_dni"}
    kinds = {type(leaf) for leaf in leaves(ours["lightning_dni"])}
    assert kinds <= {torch.Tensor, str, int, float, bool, type(None)}
    assert list(ours["state_dict"]) == list(net().state_dict())
    assert len(ours["optimizer_states"]) == 1


def test_a_checkpoint_loads_strictly_without_us(tmp_path):
    module = net(optimizer="adam")
    path = saved(tmp_path, module)
    loaded = Net.load_from_checkpoint(path, strict=True, weights_only=True)
    assert different(weights(loaded), weights(module)) == []


@pytest.mark.parametrize("estimator", [LINEAR, MLP, LOCAL], ids=["linear", "mlp", "local_loss"])
@pytest.mark.parametrize("options", [{}, {"bp_lambda": 0.5, "accumulate_grad_batches": 3}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, estimator, options):
    bp_lambda = options.get("bp_lambda", 0.0)
    trainer_options = {k: v for k, v in options.items() if k != "bp_lambda"}

    def strategy():
        return dni(estimator=estimator, bp_lambda=bp_lambda)

    def parts(trainer):
        engine = trainer.strategy.engine.state_dict()
        optimizers = [leaf for o in trainer.optimizers for leaf in leaves(o.state_dict())]
        return [*leaves(engine), *optimizers, *leaves(weights(trainer.lightning_module))]

    whole = fit(net(optimizer="adam"), strategy(), max_epochs=4, **trainer_options)
    path = saved(tmp_path, net(optimizer="adam"), strategy(), max_epochs=2, **trainer_options)
    torch.manual_seed(99)
    resumed = fit(net(seed=5, optimizer="adam"), strategy(), ckpt_path=path, max_epochs=4, **trainer_options)
    assert resumed.global_step == whole.global_step
    one, other = parts(whole), parts(resumed)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_resumed_run_goes_on_from_a_checkpoint_that_a_callback_wrote(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    whole = net(batch_norm=True)
    fit(whole, dni(), callbacks=[keep], enable_checkpointing=True, max_epochs=3)
    resumed = net(seed=5, batch_norm=True)
    fit(resumed, dni(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert different(weights(whole), weights(resumed)) == []


def test_another_strategy_resumes_our_checkpoint(tmp_path):
    path = saved(tmp_path, net(optimizer="adam"))
    module = net(seed=5, optimizer="adam")
    trainer = fit(module, "auto", ckpt_path=path, max_epochs=2)
    assert trainer.global_step == 20
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert "lightning_dni" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)


def test_we_resume_a_plain_checkpoint_with_a_warning(tmp_path):
    path = saved(tmp_path, strategy="auto")
    strategy = dni()
    with pytest.warns(UserWarning, match="holds no gradient estimators"):
        trainer = fit(net(seed=5), strategy, ckpt_path=path, max_epochs=2)
    assert trainer.global_step == 20
    assert strategy.engine.estimators


def test_a_fit_from_scratch_does_not_speak_of_checkpoints(tmp_path, recwarn):
    path = saved(tmp_path, strategy="auto")
    trainer = quiet_trainer(dni())
    module = net()
    trainer.validate(module, loader(), ckpt_path=path, verbose=False)
    trainer.fit(module, loader())
    assert not [w for w in recwarn if "gradient estimators" in str(w.message)]


def test_a_fit_from_scratch_takes_no_estimators_from_a_checkpoint_that_was_only_evaluated(tmp_path):
    path = saved(tmp_path)
    strategy = dni()
    trainer = quiet_trainer(strategy)
    module = net()
    trainer.validate(module, loader(), ckpt_path=path, verbose=False)
    trainer.fit(module, loader())
    assert strategy.engine.state_dict()["steps"] == 10


def test_a_checkpoint_of_other_boundaries_can_be_evaluated_after_a_fit(tmp_path):
    path = saved(tmp_path, strategy=dni(boundaries=["net.0"]))
    module = net()
    trainer = fit(module, dni(boundaries=["net.1"]))
    trainer.test(module, loader(), ckpt_path=path, verbose=False)


def test_evaluating_a_checkpoint_does_not_move_the_running_estimators(tmp_path):
    path = saved(tmp_path)
    strategy = dni()
    module = net()
    trainer = fit(module, strategy, max_epochs=2)
    before = copy.deepcopy(strategy.engine.state_dict())
    trainer.test(module, loader(), ckpt_path=path, verbose=False)
    after = strategy.engine.state_dict()
    assert before["steps"] == after["steps"]
    assert different(before["estimators"]["net.0"], after["estimators"]["net.0"]) == []


def test_weights_alone_are_saved_without_optimizers(tmp_path):
    trainer = fit(net(), dni())
    path = tmp_path / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    ours = torch.load(path, weights_only=True)["lightning_dni"]
    assert "optimizers" not in ours
    assert set(ours["estimators"]) == set(BOUNDARIES)
    Net.load_from_checkpoint(path, strict=True)


def test_a_checkpoint_written_before_the_first_step_can_be_resumed(tmp_path):
    class SaveFirst(pl.Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    whole, resumed = net(), net(seed=5)
    fit(whole, dni(), callbacks=[SaveFirst()])
    fit(resumed, dni(), ckpt_path=tmp_path / "first.ckpt")
    assert different(weights(whole), weights(resumed)) == []


def test_a_trainer_can_go_back_to_where_it_began(tmp_path):
    """The same Trainer, with its estimators built, resumes a checkpoint that has none yet."""

    class SaveFirst(pl.Callback):
        def on_train_start(self, trainer, module):
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    module, strategy = net(), dni()
    trainer = fit(module, strategy, callbacks=[SaveFirst()])
    first = weights(module)
    torch.manual_seed(0)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert different(first, weights(module)) == []


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (BOUNDARIES, ["net.0"], "Resume with the `boundaries` of the saved run"),
        (["net.0"], BOUNDARIES, "Resume with the `boundaries` of the saved run"),
        (["net.0"], ["net.1"], "Resume with the `boundaries` of the saved run"),
    ],
    ids=["fewer", "more", "others"],
)
def test_resuming_with_other_boundaries_is_refused_for_that(tmp_path, then, now, message):
    path = saved(tmp_path, strategy=dni(boundaries=then))
    module = net(seed=5)
    with pytest.raises(BoundaryError, match=message):
        fit(module, dni(boundaries=now), ckpt_path=path, max_epochs=2)
    assert hooks_on(module) == 0


def test_resuming_with_another_estimator_is_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(EstimatorError, match="Resume with the `estimator` of the saved run"):
        fit(net(seed=5), dni(estimator=MLP), ckpt_path=path, max_epochs=2)


def test_a_lambda_that_was_asked_for_outlives_a_resume(tmp_path):
    """An argument of the constructor is never silently replaced by what a file says."""
    path = saved(tmp_path, strategy=dni(bp_lambda=0.0))
    strategy = dni(bp_lambda=0.5)
    fit(net(seed=5), strategy, ckpt_path=path, max_epochs=2)
    assert strategy.engine.bp_lambda == {"net.0": 0.5, "net.1": 0.5}


def test_a_second_resume_in_one_trainer_belongs_to_the_module_that_is_trained(tmp_path):
    """By name, each module brings its own boundaries."""

    class Low(Net):
        def configure_dni(self):
            return {"boundaries": ["net.0"], "estimator": LINEAR}

    class High(Net):
        def configure_dni(self):
            return {"boundaries": ["net.1"], "estimator": LINEAR}

    path = saved(tmp_path, High(), DNIStrategy())
    trainer = fit(Low(), "dni")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(High(), loader(), ckpt_path=path)
    assert trainer.global_step == 20
