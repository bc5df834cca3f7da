"""Bugs of several losses, values that are not finite, and states; each test says what should happen."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS, attached, blobs, grads, mlp, run_step
from ddp_fits import ddp, fit_on_rank, trainers
from fits import LINEAR as FIT_LINEAR
from fits import Net, different, dni, fit, weights
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LambdaLR, StepLR

from lightning_dni.errors import DNIError
from lightning_dni.estimators import LinearEstimator

LINEAR = VECTOR_ESTIMATORS["linear"]
NAN = float("nan")


def stepped(model, **options):
    """An engine whose estimators have taken a step."""
    engine = attached(model, ["0", "1"], options.pop("estimator", LINEAR), **options)
    run_step(engine, model, blobs())
    engine.update_estimators()
    model.zero_grad()
    return engine


def poison(parameter):
    with torch.no_grad():
        parameter.view(-1)[0] = NAN


class ByHand(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False


def made(kind):
    torch.manual_seed(0)
    return kind()


# ---- manual optimization


@pytest.mark.parametrize("manual", [True, False])
def test_a_backward_pass_restricted_to_inputs_goes_through_the_cuts_or_is_refused(manual):
    class ByInputs(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]), inputs=list(self.parameters()))
            optimizer.step()

    class Overridden(Net):
        def backward(self, loss):
            loss.backward(inputs=list(self.parameters()))

    kind = ByInputs if manual else Overridden
    cut, plain = made(kind), made(kind)
    fit(plain)
    try:
        fit(cut, dni(bp_lambda=1.0))
    except DNIError:
        return
    assert different(weights(cut), weights(plain)) == []


def test_a_loss_differentiated_without_manual_backward_is_refused():
    class Direct(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            optimizer.step()

    with pytest.raises(DNIError):
        fit(made(Direct), dni())


def test_a_scale_that_moves_between_two_steps_of_a_batch_changes_no_gradient():
    class Twice(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    found = []
    for interval in (10**6, 1):  # powers of two: the scale itself makes (almost) no difference
        scaler = GradScaler("cpu", init_scale=1.0, growth_interval=interval)
        module = made(Twice)
        fit(module, dni(), limit_train_batches=6, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_a_block_keeps_no_gradients_of_the_passes_that_are_over():
    model, held = mlp(), []
    engine = attached(model, ["0", "1"], LinearEstimator)
    with engine.training_step(None, several_losses=True):
        for _ in range(4):
            x, y = blobs()
            engine.backward(F.cross_entropy(model(x), y))
            engine.update_estimators()
            held.append(weakref.ref(model[0][0].weight.grad))
            model.zero_grad()
        gc.collect()
        assert [gradient() for gradient in held] == [None] * 4


@pytest.mark.parametrize("keeps", ["loss", "activation"])
def test_what_is_kept_from_an_earlier_batch_is_differentiated_or_refused(keeps):
    class Later(ByHand):
        def training_step(self, batch, batch_idx):
            h = self.net[1](self.net[0](batch[0]))
            loss = F.cross_entropy(self.net[2](h), batch[1])
            if batch_idx % 2 == 0:
                self.kept = [loss if keeps == "loss" else h]
                return
            earlier = self.kept.pop()
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss + (earlier if keeps == "loss" else earlier.square().mean()))
            optimizer.step()

    cut, plain = made(Later), made(Later)
    fit(plain)
    try:
        fit(cut, dni(bp_lambda=1.0))
    except DNIError:
        return
    torch.testing.assert_close(weights(cut), weights(plain))


def test_a_loss_of_several_elements_with_a_gradient_of_its_own_trains_as_under_the_plain_trainer():
    class Rows(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
            self.manual_backward(losses, gradient=torch.full_like(losses, 1 / len(losses)))
            optimizer.step()

    cut, plain = made(Rows), made(Rows)
    fit(plain)
    fit(cut, dni(bp_lambda=1.0))
    assert different(weights(cut), weights(plain)) == []


def test_no_hook_is_left_on_an_optimizer_that_is_returned_twice():
    class Same(ByHand):
        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [self.optimizer, self.optimizer]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    module = made(Same)
    fit(module, dni())
    assert not module.optimizer._optimizer_step_post_hooks


# ---- what is not finite


@pytest.mark.parametrize("bp_lambda", [0.5, {"0": 1.0, "1": 0.0}], ids=str)
def test_a_skipped_synthetic_gradient_reaches_no_stage_further_down(bp_lambda):
    torch.manual_seed(0)
    model = mlp()
    engine = stepped(model, on_nonfinite="skip", bp_lambda=bp_lambda)
    poison(engine.estimators["1"].map.weight)
    run_step(engine, model, blobs())
    assert engine.skipped["1"] == 1
    assert all(g is None or g.isfinite().all() for g in grads(model).values())


def test_a_loss_that_is_not_finite_under_skip_does_not_acquit_the_estimators():
    model = mlp()
    engine = stepped(model, on_nonfinite="skip")
    poison(model[0][0].weight)
    with pytest.raises(DNIError) as caught:
        run_step(engine, model, blobs())
    assert engine.skipped == {"0": 1, "1": 1}
    assert "synthetic gradients that are finite" not in str(caught.value)


def test_a_late_look_names_the_activation_and_not_the_estimator_that_it_spoiled():
    model = mlp()
    engine = stepped(model)
    engine._device = torch.device("meta")  # any device that is not the CPU, as tests/core/test_health.py
    poison(model[1][0].weight)
    run_step(engine, model, blobs())
    engine.update_estimators()
    with pytest.raises(DNIError, match="the activation there is not finite"):
        engine.check_values()


def test_processes_name_the_activation_too():
    def run(rank):
        class Spoiled(Net):
            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx == 3:
                    poison(self.net[0][0].weight)

        try:
            fit_on_rank(rank, ddp(), module=made(Spoiled), log_every_n_steps=2)
        except DNIError as error:
            return str(error)

    for said in trainers(run):
        assert "the activation there is not finite" in said


def test_a_plain_loop_on_an_accelerator_keeps_a_bounded_number_of_observations():
    model = mlp()
    engine = stepped(model)
    engine._device = torch.device("meta")
    for _ in range(300):
        run_step(engine, model, blobs())
        engine.update_estimators()
    assert len(engine._health._unread) <= 1000


def test_an_estimator_whose_parameters_are_lost_is_named_under_a_scaler_too():
    model = mlp()
    engine = stepped(model)
    poison(engine.estimators["1"].map.weight)

    def go_on():
        for _ in range(50):
            run_step(engine, model, blobs(), scale=torch.tensor(2.0, dtype=torch.float64))
            engine.drop_estimator_gradients()
            engine.check_values()

    with pytest.raises(DNIError):
        go_on()


# ---- state


def test_a_loaded_state_forgets_what_was_observed_before():
    model = mlp()
    engine = stepped(model)
    good = copy.deepcopy(engine.state_dict())
    engine._device = torch.device("meta")
    poison(engine.estimators["1"].map.weight)
    run_step(engine, model, blobs())
    engine.load_state_dict(good)
    engine.check_values()


def test_a_loaded_state_has_no_update_pending():
    model = mlp()
    engine = stepped(model, estimator_scheduler=partial(StepLR, step_size=1))
    good = copy.deepcopy(engine.state_dict())
    run_step(engine, model, blobs())
    engine.load_state_dict(good)
    engine.update_estimators()
    assert engine.state_dict()["schedules"] == good["schedules"]


def test_the_state_of_another_kind_of_scheduler_is_refused_by_name():
    saved = stepped(mlp(), estimator_scheduler=partial(StepLR, step_size=1)).state_dict()
    engine = stepped(mlp(), estimator_scheduler=partial(LambdaLR, lr_lambda=lambda step: 0.9**step))
    with pytest.raises(DNIError, match="StepLR"):
        engine.load_state_dict(saved)


def test_a_state_that_lacks_something_is_refused_and_changes_nothing():
    engine = stepped(mlp())
    before, state = engine.estimators["0"], copy.deepcopy(engine.state_dict())
    del state["skipped"]
    with pytest.raises((DNIError, KeyError)):
        engine.load_state_dict(state)
    assert engine.estimators["0"] is before


# ---- estimators without autograd


def test_a_frozen_parameter_of_an_estimator_gets_no_gradient():
    def frozen(spec):
        estimator = LINEAR(spec)
        estimator.map.weight.requires_grad_(False)
        return estimator

    engine = stepped(mlp(), estimator=frozen)
    assert all(e.map.weight.grad is None for e in engine.estimators.values())


def test_a_parameter_frozen_in_mid_training_stays():
    model = mlp()
    engine = stepped(model)
    bias = engine.estimators["1"].map.bias.requires_grad_(False)
    before = bias.clone()
    run_step(engine, model, blobs())
    engine.update_estimators()
    assert torch.equal(bias, before)


def test_a_reparametrized_estimator_learns():
    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def halved(spec):
        estimator = FIT_LINEAR(spec)
        parametrize.register_parametrization(estimator.map, "weight", Half())
        return estimator

    strategy = dni(estimator=halved)
    fit(made(Net), strategy)
    assert all(bool(p.any()) for p in strategy.engine.estimators["net.1"].parameters())
