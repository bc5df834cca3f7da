"""DNIStrategy in real fits: order of events, what it leaves behind, what it saves, what it refuses."""

import copy
import gc
import signal
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    BOUNDARIES,
    CLASSES,
    FEATURES,
    LINEAR,
    AtBatchEnd,
    AtBatchStart,
    BrokenError,
    Losses,
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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni import DNIStrategy
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import LocalLossEstimator, MLPEstimator, ZeroEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
LOCAL = partial(LocalLossEstimator, num_classes=CLASSES)
"""An estimator whose gradient is not zero at the first step."""


def lower(module):
    """Parameters below the last boundary."""
    return [p for stage in module.net[:2] for p in stage.parameters()]


def first_batches(count):
    return loader(rows=8 * count)


# ---- gradients arrive where Lightning looks for them


class Seen(pl.Callback):
    """Gradients of the lowest weight at the hooks where users look at them."""

    def __init__(self):
        self.at = {"on_after_backward": [], "on_before_optimizer_step": []}

    def on_after_backward(self, trainer, module):
        self._note("on_after_backward", module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self._note("on_before_optimizer_step", module)

    def _note(self, hook, module):
        grad = module.net[0][0].weight.grad
        self.at[hook].append(None if grad is None else grad.clone())


def test_lightnings_zero_grad_between_forward_and_backward_wipes_nothing():
    module, seen = net(), Seen()
    zeroed = []

    class Zeroed(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            zeroed.append(trainer.global_step)

    before = weights(module)
    fit(module, dni(estimator=LOCAL), first_batches(3), callbacks=[seen, Zeroed()])
    assert zeroed == [0, 1, 2]
    # zero at the start, the heads have learnt after the first step
    assert all(bool(g.any()) for g in seen.at["on_before_optimizer_step"][1:])
    assert "net.0.0.weight" in different(before, weights(module))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_merged_before_the_first_hook_that_may_look_at_them(accumulate):
    seen = Seen()
    fit(net(), dni(estimator=LOCAL), first_batches(4), callbacks=[seen], accumulate_grad_batches=accumulate)
    at_step = seen.at["on_before_optimizer_step"]
    after = seen.at["on_after_backward"]
    assert (len(after), len(at_step)) == (4, 4 // accumulate)
    for i, grad in enumerate(at_step):
        assert torch.equal(after[(i + 1) * accumulate - 1], grad)
    assert bool(at_step[-1].any())


def test_accumulated_gradients_are_the_mean_over_the_window():
    """Two halves of a batch, accumulated, give what the whole batch gives."""
    halves, whole = Seen(), Seen()
    estimators = dni(estimator=LOCAL), dni(estimator=LOCAL)
    fit(net(), estimators[0], loader(32, 8), callbacks=[halves], accumulate_grad_batches=2)
    fit(net(), estimators[1], loader(32, 16), callbacks=[whole])
    for a, b in zip(halves.at["on_before_optimizer_step"], whole.at["on_before_optimizer_step"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(*(s.engine.estimators["net.0"].parameters() for s in estimators), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class ZeroesItself(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        for p in self.parameters():
            p.grad = None


class NeverZeroes(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize("kind", [ZeroesItself, NeverZeroes])
def test_a_users_own_zero_grad_means_what_it_means_without_us(kind):
    trained = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        torch.manual_seed(0)
        module = kind()
        fit(module, strategy)
        trained.append(weights(module))
    assert different(*trained) == []


def test_a_users_own_zero_grad_does_not_wipe_synthetic_gradients():
    torch.manual_seed(0)
    module, twin = ZeroesItself(), net()
    fit(module, dni(estimator=LOCAL))
    fit(twin, dni(estimator=LOCAL))
    assert different(weights(module), weights(twin)) == []


def test_hooks_on_parameters_see_each_gradient_once_as_under_wandb_watch():
    module, seen, applied = net(), [], Seen()
    module.net[0][0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    fit(module, dni(estimator=LOCAL), callbacks=[applied])
    assert len(seen) == 10
    assert all(map(torch.equal, seen, applied.at["on_before_optimizer_step"]))


def test_clipping_bounds_all_gradients_together():
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            norms.extend([torch.stack([g.norm() for g in grads]).norm().item()] if grads else [])
            self.lower_is_there = any(bool(p.grad.any()) for p in lower(module) if p.grad is not None)

    callback = Norm()
    fit(net(), dni(estimator=LOCAL), callbacks=[callback], gradient_clip_val=0.01)
    assert callback.lower_is_there
    assert len(norms) == 9
    assert norms == pytest.approx([0.01] * 9, rel=1e-3)


def test_hooks_of_a_step_fire_in_lightnings_order():
    def order(strategy):
        events = []
        names = ["on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
                 "on_before_optimizer_step", "on_train_batch_end"]  # fmt: skip
        note = {name: lambda self, *args, name=name: events.append(name) for name in names}
        fit(net(), strategy, callbacks=[type("Order", (pl.Callback,), note)()], accumulate_grad_batches=2)
        return events

    assert order(dni()) == order("auto")


# ---- what a training step may be


class ReturnsNone(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_returns_none_is_skipped_as_without_us(accumulate):
    trained = []
    for strategy in ("auto", dni(bp_lambda=1.0)):
        torch.manual_seed(0)
        module = ReturnsNone()
        fit(module, strategy, accumulate_grad_batches=accumulate)
        trained.append(weights(module))
    assert different(*trained) == []


def test_a_step_that_returns_none_teaches_the_estimators_nothing():
    class Never(Net):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, strategy = Never(), dni(estimator=LOCAL)
    before = weights(module)
    fit(module, strategy)
    assert different(before, weights(module)) == []
    assert not any(bool(p.any()) for e in strategy.engine.estimators.values() for p in e.parameters())


class ReturnsDict(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": batch_idx}


def test_a_step_may_return_a_dict():
    torch.manual_seed(0)
    module, twin = ReturnsDict(), net()
    fit(module, dni())
    fit(twin, dni())
    assert different(weights(module), weights(twin)) == []


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


BATCHES = {
    "tuple": (tuple, lambda b: b),
    "list": (list, lambda b: b),
    "dict": (lambda b: {"image": b[0], "label": b[1]}, lambda b: (b["image"], b["label"])),
    "dict, labels first": (lambda b: {"y": b[1], "x": b[0]}, lambda b: (b["x"], b["y"])),
    "namedtuple": (lambda b: Pair(*b), lambda b: b),
    "dataclass": (lambda b: Sample(*b), lambda b: (b.x, b.y)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_labels_are_found_in_any_kind_of_batch(kind):
    pack, unpack = BATCHES[kind]

    class Packed(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(unpack(batch), batch_idx)

    def collate(samples):
        return pack(torch.utils.data.default_collate(samples))

    torch.manual_seed(0)
    module, twin = Packed(), net()
    fit(module, dni(), loader(collate_fn=collate))
    fit(twin, dni())
    assert different(weights(module), weights(twin)) == []


def test_a_batch_without_labels_is_refused_where_the_estimator_needs_them():
    class Alone(Net):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    with pytest.raises(EstimatorError, match="Pass `labels=`"):
        fit(Alone(), dni(), DataLoader(torch.randn(16, FEATURES), 8))


# ---- precision


def test_under_bf16_mixed_the_estimators_run_and_learn_in_float32():
    strategy = dni(estimator=MLP)
    seen = []

    def look(trainer, module, batch_idx):
        estimator = trainer.strategy.engine.estimators["net.0"]
        seen.append({t.dtype for t in [*estimator.parameters(), *estimator.buffers()]} - {torch.int64})
        report = trainer.strategy.engine.last_report.boundaries["net.0"]
        seen.append({report.synthetic.dtype, report.target.dtype, report.loss.dtype})

    request = AtBatchStart(lambda trainer, module, batch_idx: trainer.strategy.engine.request_report())
    module = net()
    fit(module, strategy, callbacks=[request, AtBatchEnd(look)], precision="bf16-mixed", max_epochs=2)
    assert all(dtypes == {torch.float32} for dtypes in seen)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_bf16_mixed_trains_close_to_float32():
    final = {}
    for precision in ("32-true", "bf16-mixed"):
        losses = Losses()
        fit(net(), dni(estimator=LOCAL), callbacks=[losses], precision=precision, max_epochs=3)
        final[precision] = torch.tensor(losses.train)
    torch.testing.assert_close(final["bf16-mixed"], final["32-true"], rtol=0.05, atol=0.05)


def test_under_float64_the_estimators_are_float64():
    strategy = dni()
    fit(net(), strategy, precision="64-true")
    assert {p.dtype for e in strategy.engine.estimators.values() for p in e.parameters()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", pytest.param("plugin", id="16-mixed")])
def test_other_precisions_are_refused_by_name(precision):
    # on the CPU, Trainer(precision="16-mixed") quietly means bf16-mixed: the plugin itself does not
    plugin = precision == "plugin"
    asked = {"plugins": MixedPrecision("16-mixed", "cpu")} if plugin else {"precision": precision}
    expected = "16-mixed" if plugin else precision
    with pytest.raises(MisconfigurationException, match=f"Expected a precision of .* but got '{expected}'"):
        fit(net(), dni(), **asked)


# ---- what is refused


class ByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in (self.net[0], self.net[1])]


class SecondOrder(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByHand, "automatic_optimization is False.*DNIEngine in your own loop"),
        (
            TwoOptimizers,
            "Expected one optimizer .*TwoOptimizers.configure_optimizers gave 2.*parameter groups",
        ),
        (SecondOrder, "got LBFGS, which evaluates it several times"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_before_any_step(kind, message):
    torch.manual_seed(0)
    module = kind()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, dni())
    assert different(before, weights(module)) == []
    assert hooks_on(module) == 0


@pytest.mark.parametrize("strategy", ["dni", dni], ids=["by name", "instance"])
@pytest.mark.parametrize("devices", [2, "2"])
def test_two_devices_are_refused(strategy, devices):
    with pytest.raises(MisconfigurationException, match=r"Expected one device .* got 2\. Pass `Trainer\(dev"):
        quiet_trainer(strategy if isinstance(strategy, str) else strategy(), devices=devices)


@pytest.mark.parametrize("strategy", ["dni", dni], ids=["by name", "instance"])
def test_two_nodes_are_refused(strategy):
    with pytest.raises(
        MisconfigurationException, match=r"Expected one node .* got 2\. Pass `Trainer\(num_no"
    ):
        quiet_trainer(strategy if isinstance(strategy, str) else strategy(), num_nodes=2)


class NumberedDevice(CPUAccelerator):
    """An accelerator that is not called "cpu" and has devices with a number, as GPUs have."""

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cpu", 0)]


@pytest.mark.parametrize("strategy", ["dni", dni], ids=["by name", "instance"])
def test_the_device_is_the_accelerators(strategy):
    made = strategy if isinstance(strategy, str) else strategy()
    trainer = quiet_trainer(made, accelerator=NumberedDevice(), devices=1)
    assert trainer.strategy.root_device == torch.device("cpu", 0)


def test_a_strategy_asks_for_no_device_of_its_own():
    """Lightning reads this before it chooses an accelerator: a device here would keep it off the GPU."""
    assert not dni().parallel_devices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_it_trains_on_the_gpu_that_lightning_chose(accelerator):
    strategy = dni(estimator=MLP)
    trainer = fit(net(), strategy, accelerator=accelerator, devices=1)
    assert trainer.strategy.root_device.type == "cuda"
    assert {p.device.type for e in strategy.engine.estimators.values() for p in e.parameters()} == {"cuda"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"boundaries": ["nets.0"]}, BoundaryError, "Did you mean 'net.0'"),
        ({"boundaries": []}, BoundaryError, "non-empty list"),
        ({"output": "nett"}, BoundaryError, "Expected `output` to name a submodule"),
        ({"bp_lambda": 1.5}, EstimatorError, r"Expected `bp_lambda` to be in \[0, 1\]"),
        ({"bp_lambda": {"net.0": 0.5}}, BoundaryError, "pattern in `bp_lambda` to match boundary 'net.1'"),
        ({"estimator": {"net.0": LINEAR}}, BoundaryError, "pattern in `estimator` to match boundary 'net.1'"),
        ({"estimator_steps": 0}, EstimatorError, "Expected `estimator_steps` to be at least 1"),
        ({"estimator_optimizer": lambda groups: None}, EstimatorError, "make a torch optimizer"),
        ({"labels": "class"}, EstimatorError, "Expected `labels='class'` to be in the batch"),
        ({"estimator": partial(LINEAR.func, num_classes=2)}, EstimatorError, r"labels in \[0, 2\)"),
    ],
)
def test_a_wrong_option_is_named_in_the_first_step_at_the_latest(options, error, message):
    module = net()
    before = weights(module)
    with pytest.raises(error, match=message):
        fit(module, dni(**options))
    assert different(before, weights(module)) == []
    assert hooks_on(module) == 0


# ---- silent full backprop


def test_a_boundary_that_ran_only_in_a_forward_for_logging_is_refused():
    """The loss goes around every cut: without an error this is full backprop under another name."""

    class Bypassed(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            self(x)
            for stage in self.net:
                x = stage.forward(x)
            return F.cross_entropy(x, y)

    with pytest.raises(BoundaryError, match="Expected every boundary to run in the forward pass that reach"):
        fit(Bypassed(), dni(estimator=ZeroEstimator))


def test_a_boundary_whose_output_cannot_be_opened_is_refused():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, 8)

        def forward(self, x):
            return Sample(self.layer(x), None)

    class Hidden(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Hides(), nn.Linear(8, CLASSES))

        def forward(self, x):
            return self.net[1](self.net[0](x).x)

    with pytest.raises(BoundaryError, match=r"net\.0"):
        fit(Hidden(), dni(boundaries=["net.0"], estimator=ZeroEstimator))


def test_a_skipped_boundary_is_refused_on_the_step_that_skips_it():
    class Skips(Net):
        def forward(self, x):
            h = self.net[0](x)
            return self.net[2](h if self.global_step == 3 else self.net[1](h))

    steps = []
    count = AtBatchEnd(lambda trainer, module, batch_idx: steps.append(batch_idx))
    with pytest.raises(BoundaryError, match=r"\['net.1'\] did not"):
        fit(Skips(), dni(), callbacks=[count])
    assert steps == [0, 1, 2]


def test_an_in_place_error_of_the_users_own_is_not_blamed_on_a_boundary():
    class InPlace(Net):
        def training_step(self, batch, batch_idx):
            self.net[2].bias.add_(1.0)

    with pytest.raises(RuntimeError, match="leaf Variable that requires grad") as caught:
        fit(InPlace(), dni())
    assert not isinstance(caught.value, BoundaryError)


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
    """As many tensors are alive after the tenth step as after the fifth."""
    counts = []

    def count(trainer, module, batch_idx):
        if batch_idx in (4, 9):
            counts.append(tensors_alive())

    fit(net(), dni(estimator=MLP), callbacks=[AtBatchEnd(count)])
    assert counts[0] == counts[1]


def test_fits_hold_on_to_nothing():
    module = net()
    fit(module, dni())
    once = tensors_alive()
    fit(module, dni())
    fit(module, dni())
    assert tensors_alive() == once


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
        (BOUNDARIES, ["net.0"], r"but got \['net.1'\] too. Resume with the `boundaries` of the saved run"),
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


def test_a_refused_resume_is_not_tried_again_by_the_next_fit(tmp_path):
    path = saved(tmp_path)
    trainer = quiet_trainer(dni(boundaries=["net.0"]))
    with pytest.raises(BoundaryError, match="Resume with the `boundaries`"):
        trainer.fit(net(), loader(), ckpt_path=path)
    trainer.fit(net(), loader())
    assert trainer.state.finished


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
