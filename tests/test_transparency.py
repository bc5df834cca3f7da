"""With bp_lambda=1 the cuts are invisible, bit for bit; in between and at 0 they do what the oracle does."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    BOUNDARIES,
    CLASSES,
    FEATURES,
    LINEAR,
    OPTIMIZERS,
    AtBatchStart,
    Losses,
    Net,
    different,
    dni,
    fit,
    loader,
    net,
    newer,
    weights,
)
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from oracles import NaiveLinearDNI
from torch import nn
from torch.nn import functional as F

from lightning_dni.estimators import LocalLossEstimator, MLPEstimator, ZeroEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
ESTIMATORS = {
    "zero": ZeroEstimator,
    "linear": LINEAR,
    "mlp": MLP,
    "local_loss": partial(LocalLossEstimator, num_classes=CLASSES),
}
FIFTY_STEPS = {"max_epochs": 5}  # of ten batches


class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class OnPlateau(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class TwoLosses(Net):
    """The same module runs twice in one forward pass, on noisy views."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y) + F.cross_entropy(self(x + torch.randn_like(x)), y)
        self.log("loss", loss)
        return loss


def observe_all(trainer, module, batch_idx):
    trainer.strategy.engine.request_probe()


def observe_some(trainer, module, batch_idx):
    if batch_idx % 3 == 1:
        trainer.strategy.engine.request_probe()
    if batch_idx % 3 == 2:
        trainer.strategy.engine.request_report()


def run(module, strategy, train=None, val=None, callbacks=(), **options):
    losses = Losses()
    made = [callback() for callback in callbacks]
    fit(module, strategy, train, val, callbacks=[losses, *made], **{**FIFTY_STEPS, **options})
    return weights(module), losses


def assert_same_run(one, other):
    assert different(one[0], other[0]) == []
    assert one[1].train == other[1].train
    assert one[1].val == other[1].val


def assert_transparent(module, train=None, val=None, callbacks=(), probes=False, estimator=MLP, **options):
    shuffled = partial(loader, shuffle=True) if train is None else train
    plain = run(copy.deepcopy(module), "auto", shuffled(), val, callbacks, **options)
    watches = [[], [partial(AtBatchStart, observe_some)]] if probes else [[]]
    for watch in watches:
        strategy = dni(bp_lambda=1.0, estimator=estimator)
        cut = run(copy.deepcopy(module), strategy, shuffled(), val, [*callbacks, *watch], **options)
        assert strategy.engine.boundaries == tuple(BOUNDARIES)
        assert_same_run(plain, cut)


# ---- bp_lambda=1 is backprop


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batch_norm", [False, True], ids=["", "batch_norm"])
def test_lambda_one_is_the_plain_trainer_bit_for_bit(optimizer, batch_norm):
    assert_transparent(net(dropout=0.3, batch_norm=batch_norm, optimizer=optimizer))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lambda_one_does_not_depend_on_the_estimator(estimator):
    assert_transparent(net(dropout=0.3), estimator=ESTIMATORS[estimator], max_epochs=2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"accumulate_grad_batches": 2}, id="accumulate 2"),
        pytest.param({"accumulate_grad_batches": 3}, id="accumulate 3, short last window"),
        pytest.param({"gradient_clip_val": 0.1}, id="clip by norm"),
        pytest.param(
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
            id="clip by value",
        ),
        pytest.param({"precision": "64-true"}, id="float64"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"detect_anomaly": True, "max_epochs": 1}, id="anomaly detection"),
    ],
)
def test_lambda_one_is_plain_whatever_the_trainer_is_asked_with_probes_and_without(options):
    assert_transparent(net(dropout=0.3, batch_norm=True, optimizer="adam"), probes=True, **options)


def test_lambda_one_is_plain_with_a_short_last_batch():
    assert_transparent(net(dropout=0.3), train=lambda: loader(rows=75, shuffle=True))


def test_lambda_one_is_plain_under_a_scheduler_that_steps_with_the_batches():
    torch.manual_seed(0)
    assert_transparent(Scheduled(dropout=0.3))


def test_lambda_one_is_plain_under_a_scheduler_that_watches_validation():
    torch.manual_seed(0)
    assert_transparent(OnPlateau(dropout=0.3), val=loader(24))


def test_lambda_one_is_plain_with_validation_in_mid_epoch():
    module = net(dropout=0.3, batch_norm=True)
    assert_transparent(module, val=loader(24), probes=True, val_check_interval=3)


def test_lambda_one_is_plain_where_a_module_runs_twice():
    torch.manual_seed(0)
    module, twin = TwoLosses(), TwoLosses()
    twin.load_state_dict(module.state_dict())
    plain, cut = run(module, "auto"), run(twin, dni(bp_lambda=1.0))
    for name, weight in plain[0].items():  # terms of a sum in another order
        torch.testing.assert_close(cut[0][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2), id="SWA"),
        newer("EMAWeightAveraging"),
        pytest.param(lambda: GradientAccumulationScheduler({0: 1, 2: 3}), id="accumulation schedule"),
    ],
)
def test_lambda_one_is_plain_beside_lightnings_callbacks(callback):
    assert_transparent(net(dropout=0.3, batch_norm=True), callbacks=[callback])


class Finetuned(Net):
    @property
    def backbone(self):
        return self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_lambda_one_is_plain_while_a_stage_is_frozen_and_after_it_thaws():
    torch.manual_seed(0)
    thaw = partial(BackboneFinetuning, unfreeze_backbone_at_epoch=2)
    assert_transparent(Finetuned(), callbacks=[thaw])


# ---- watching changes nothing


@pytest.mark.parametrize(
    ("estimator", "bp_lambda", "observe"),
    [
        ("linear", 0.0, observe_all),
        ("mlp", 0.0, observe_some),
        ("local_loss", 0.0, observe_some),
        ("linear", 0.5, observe_some),
        ("mlp", 0.5, observe_all),
        ("linear", 1.0, observe_all),
    ],
)
def test_probes_change_no_number(estimator, bp_lambda, observe):
    options = {"dropout": 0.3, "batch_norm": True, "optimizer": "adam"}
    strategy = partial(dni, estimator=ESTIMATORS[estimator], bp_lambda=bp_lambda)
    train = partial(loader, shuffle=True)
    few = {"accumulate_grad_batches": 3, "max_epochs": 2}
    unwatched = run(net(**options), strategy(), train(), **few)
    watched = run(net(**options), strategy(), train(), callbacks=[partial(AtBatchStart, observe)], **few)
    assert_same_run(unwatched, watched)


@pytest.mark.parametrize("estimator", ["linear", "mlp"])
def test_validation_in_mid_epoch_changes_no_weight(estimator):
    options = {"dropout": 0.3, "batch_norm": True}
    strategy = partial(dni, estimator=ESTIMATORS[estimator])
    without, _ = run(net(**options), strategy())
    # an unshuffled loader draws a seed from the global generator once per epoch: give it one of its own
    val = loader(24, generator=torch.Generator())
    with_it, losses = run(net(**options), strategy(), None, val, val_check_interval=3)
    assert len(losses.val) > 10
    assert different(without, with_it) == []


def test_hooks_on_parameters_run_as_often_with_probes_as_without():
    counts = []
    for watch in ([], [AtBatchStart(observe_all)]):
        module, seen = net(), []
        module.net[0][0].weight.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        fit(module, dni(), callbacks=watch)
        counts.append(len(seen))
    assert counts == [10, 10]


# ---- randomness


def generator_states(estimator):
    states = []
    record = AtBatchStart(lambda *_: states.append(torch.get_rng_state()))
    strategy = "auto" if estimator is None else dni(estimator=estimator)
    fit(net(dropout=0.3), strategy, loader(shuffle=True), loader(16), callbacks=[record], max_epochs=3)
    return torch.stack(states)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_global_generator_goes_where_it_goes_under_the_plain_trainer(estimator):
    assert torch.equal(generator_states(None), generator_states(ESTIMATORS[estimator]))


def test_a_stream_per_stage_leaves_the_global_generator_alone():
    def states(**options):
        seen = []
        record = AtBatchStart(lambda *_: seen.append(torch.get_rng_state()))
        fit(net(**options), dni(rng="stage"), loader(shuffle=True), callbacks=[record], max_epochs=2)
        return torch.stack(seen)

    assert torch.equal(states(), states(dropout=0.5))


# ---- the oracle


def batches_of(train, epochs):
    return [(x.double(), y) for _ in range(epochs) for x, y in train]


def naive_fit(stages, optimizer, batches, bp_lambda=0.0, accumulate=1, clip=None):
    """The hand-written loop of tests/oracles.py with the user's optimizer around it."""
    widths = [stage[0].out_features for stage in stages[:-1]]
    oracle = NaiveLinearDNI(stages, widths, CLASSES, bp_lambda, lr=1e-2)
    optimizer = OPTIMIZERS[optimizer](stages.parameters())
    step_estimators, clear_estimators = oracle.optimizer.step, oracle.optimizer.zero_grad
    losses = []
    for start in range(0, len(batches), accumulate):
        window = batches[start : start + accumulate]
        optimizer.zero_grad()
        clear_estimators()
        # one step of the estimators per window, with the mean of its gradients
        oracle.optimizer.step = oracle.optimizer.zero_grad = lambda: None
        losses += [oracle.gradients(x, y).item() for x, y in window]
        for p in [*stages.parameters(), *(p for m in oracle.maps for p in m.parameters())]:
            p.grad = None if p.grad is None else p.grad / accumulate
        if clip is not None:
            nn.utils.clip_grad_norm_(stages.parameters(), clip)
        optimizer.step()
        step_estimators()
    return losses


def assert_parity(optimizer, batch_norm, bp_lambda=0.0, accumulate=1, clip=None):
    module = net(batch_norm=batch_norm, optimizer=optimizer)
    stages = copy.deepcopy(module.net).double()
    train = loader()
    expected = naive_fit(stages, optimizer, batches_of(train, epochs=5), bp_lambda, accumulate, clip)
    strategy = dni(bp_lambda=bp_lambda, estimator_optimizer=partial(torch.optim.Adam, lr=1e-2))
    got, losses = run(module, strategy, train, precision="64-true", accumulate_grad_batches=accumulate,
                      gradient_clip_val=clip)  # fmt: skip
    for name, weight in stages.state_dict().items():
        torch.testing.assert_close(got[f"net.{name}"], weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.tensor(losses.train), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["", "batch_norm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_trainer_ends_with_the_weights_of_the_hand_written_loop(optimizer, batch_norm, bp_lambda):
    assert_parity(optimizer, batch_norm, bp_lambda)


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_parity_holds_over_accumulated_batches(accumulate, bp_lambda):
    assert_parity("adam", True, bp_lambda, accumulate)


def test_parity_holds_under_clipping():
    assert_parity("sgd", False, clip=0.05)


def test_the_estimators_are_those_of_the_hand_written_loop_too():
    module = net()
    stages = copy.deepcopy(module.net).double()
    oracle = NaiveLinearDNI(stages, [8, 8], CLASSES, lr=1e-2)
    optimizer = OPTIMIZERS["sgd"](stages.parameters())
    for x, y in batches_of(loader(), epochs=1):
        optimizer.zero_grad()
        oracle.gradients(x, y)
        optimizer.step()
    strategy = dni(estimator_optimizer=partial(torch.optim.Adam, lr=1e-2))
    fit(module, strategy, precision="64-true")
    for linear, estimator in zip(oracle.maps, strategy.engine.estimators.values(), strict=True):
        together = torch.cat([estimator.map.weight, estimator.conditioning.weight.T], 1)
        torch.testing.assert_close(together, linear.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(estimator.map.bias, linear.bias, rtol=0, atol=1e-10)


# ---- no gradient where none belongs


class GradientsAtTheStep(pl.Callback):
    def __init__(self):
        self.present = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.present.append({name for name, p in module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_under_zero_no_parameter_below_the_last_boundary_moves_by_one_bit(optimizer, accumulate):
    module, seen = net(batch_norm=True, optimizer=optimizer), GradientsAtTheStep()
    before = weights(module)
    fit(module, dni(estimator=ZeroEstimator), callbacks=[seen, AtBatchStart(observe_some)],
        accumulate_grad_batches=accumulate, **FIFTY_STEPS)  # fmt: skip
    moved = set(different(before, weights(module)))
    trained = {name for name, _ in module.named_parameters()} & moved
    assert trained == {"net.2.weight", "net.2.bias"}
    assert all(present == {"net.2.weight", "net.2.bias"} for present in seen.present)
    assert all(p.grad is None for stage in module.net[:2] for p in stage.parameters())


def test_a_stage_learns_what_its_estimator_says_and_nothing_of_the_true_gradient():
    """Two losses that differ above the boundaries only leave the first step's lower gradients alone."""
    seen = []
    for scale in (1.0, 100.0):
        module = net()
        with torch.no_grad():
            module.net[2].weight.mul_(scale)
        take = GradientsBelow()
        fit(module, dni(estimator=partial(LocalLossEstimator, num_classes=CLASSES)), callbacks=[take])
        seen.append(take.first)
    assert len(seen[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class GradientsBelow(pl.Callback):
    def __init__(self):
        self.first = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.first is None:
            grads = [p.grad for stage in module.net[:2] for p in stage.parameters()]
            self.first = [torch.zeros(()) if g is None else g.clone() for g in grads]


def test_the_tests_can_fail():
    """Guard: lambda 0 is not the plain Trainer, and the naive oracle is not backprop."""
    plain, cut = run(net(), "auto"), run(net(), dni())
    assert "net.0.0.weight" in different(plain[0], cut[0])
    assert net().net[0][0].in_features == FEATURES
