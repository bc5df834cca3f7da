"""What DNIStrategy cannot do is refused by name, and backprop never happens in silence."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from fits import (
    CLASSES,
    FEATURES,
    LINEAR,
    AtBatchEnd,
    Net,
    different,
    dni,
    fit,
    hooks_on,
    net,
    quiet_trainer,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import MLPEstimator, ZeroEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


# ---- what is refused


class TwoOptimizers(Net):
    def configure_optimizers(self):
        return [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in (self.net[0], self.net[1])]


class SecondOrder(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Repeating(torch.optim.SGD):
    """Evaluates its closure twice, as sharpness-aware and line-searching optimizers do."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


class LooksTwice(Net):
    def configure_optimizers(self):
        return Repeating(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (TwoOptimizers, RuntimeError, "multiple optimizers is only supported with manual optimization"),
        (SecondOrder, MisconfigurationException, "got LBFGS, which evaluates it several times"),
        (LooksTwice, MisconfigurationException, "got Repeating, which evaluates it several times"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_before_any_step(kind, error, message):
    torch.manual_seed(0)
    module = kind()
    before = weights(module)
    with pytest.raises(error, match=message):
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
        ({"estimator_steps": 0}, EstimatorError, "Expected `estimator_steps` to be an integer of at least 1"),
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
