"""The context comes out of any batch: of any shape, continuous, per token, or none at all."""

from collections import UserDict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from fits import CLASSES, FEATURES, Net, different, dni, fit, loader, net, weights
from lightning.pytorch.utilities import CombinedLoader
from strategies.loops import ADAM, MLP
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator

# ---- the shape of a batch


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    inputs: dict
    target: torch.Tensor


class Opaque:
    """Neither a sequence nor a mapping; Lightning moves it by its `to`."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Opaque(self.x.to(device), self.y.to(device))


SHAPES = {
    "nested dicts in a tuple": (
        lambda x, y: (({"x": x}, {"y": y}), "meta"), lambda b: (b[0][0]["x"], b[0][1]["y"]),
        lambda b: b[0][1]["y"]),
    "named tuple in a dict": (lambda x, y: {"pair": Pair(x, y)}, lambda b: b["pair"], lambda b: b["pair"].y),
    "named tuple of dicts": (
        lambda x, y: Pair({"a": x}, {"b": y}), lambda b: (b.x["a"], b.y["b"]), lambda b: b.y["b"]),
    "dataclass": (lambda x, y: Sample({"x": x}, y), lambda b: (b.inputs["x"], b.target), "auto"),
    "dataclass by attribute": (
        lambda x, y: Sample({"x": x}, y), lambda b: (b.inputs["x"], b.target), "target"),
    "object": (Opaque, lambda b: (b.x, b.y), lambda b: b.y),
    "three items": (lambda x, y: [x, y, torch.ones(len(x))], lambda b: b[:2], "auto"),
    "number first": (lambda x, y: (torch.arange(len(x)), x, y), lambda b: b[1:], 2),
    "from the end": (lambda x, y: (torch.arange(len(x)), x, y), lambda b: b[1:], -1),
    "dict by key": (
        lambda x, y: {"x": x, "class": y, "name": ["a"] * len(x)}, lambda b: (b["x"], b["class"]), "class"),
    "dict by integer": (lambda x, y: {0: x, 1: y}, lambda b: (b[0], b[1]), 1),
    "user's own mapping": (lambda x, y: UserDict(x=x, labels=y), lambda b: (b["x"], b["labels"]), "auto"),
    "labels first in a dict": (lambda x, y: {"target": y, "x": x}, lambda b: (b["x"], b["target"]), "auto"),
    "byte labels": (lambda x, y: (x, y.to(torch.uint8)), lambda b: (b[0], b[1].long()), "auto"),
    "shifted labels": (lambda x, y: (x, y + 1), lambda b: (b[0], b[1] - 1), lambda b: b[1] - 1),
}  # fmt: skip


class Unpacks(Net):
    unpack = staticmethod(lambda batch: batch)

    def training_step(self, batch, batch_idx):
        return super().training_step(self.unpack(batch), batch_idx)


def unpacking(how):
    torch.manual_seed(0)
    module = Unpacks()
    module.unpack = how
    return module


def assert_same_fit(module, strategy, train, estimator=MLP):
    """As with plain pairs."""
    fit(module, strategy, train, max_epochs=2)
    twin, plain = net(), dni(estimator=estimator)
    fit(twin, plain, max_epochs=2)
    assert different(weights(module), weights(twin)) == []
    for name, ours in strategy.engine.estimators.items():
        assert different(ours.state_dict(), plain.engine.estimators[name].state_dict()) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_found_wherever_they_are(shape):
    pack, unpack, labels = SHAPES[shape]
    train = loader(collate_fn=lambda samples: pack(*default_collate(samples)))
    assert_same_fit(unpacking(unpack), dni(estimator=MLP, labels=labels), train)


def test_labels_are_those_of_the_batch_that_the_module_has_transformed():
    class Transforms(Unpacks):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch[0], "y": batch[1]}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch["x"], "labels": batch["y"]}

    torch.manual_seed(0)
    module = Transforms()
    module.unpack = lambda batch: (batch["x"], batch["labels"])
    assert_same_fit(module, dni(estimator=MLP), loader())


def test_labels_are_found_in_a_batch_of_several_loaders():
    train = CombinedLoader({"main": loader(), "aside": loader(40)}, "max_size_cycle")
    module = unpacking(lambda batch: batch["main"])
    assert_same_fit(module, dni(estimator=MLP, labels=lambda batch: batch["main"][1]), train)


def test_a_training_step_may_take_the_batch_alone():
    class Alone(Net):
        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    torch.manual_seed(0)
    assert_same_fit(Alone(), dni(estimator=MLP), loader())


def test_labels_that_are_nested_too_deep_are_asked_for():
    train = loader(collate_fn=lambda samples: {"pair": default_collate(samples)})
    with pytest.raises(EstimatorError, match=r"got none from the batch. Pass `labels=` .*a callable"):
        fit(unpacking(lambda batch: batch["pair"]), dni(estimator=MLP), train)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "Expected `labels=5` to be in the batch"),
        ("y", "Expected `labels='y'` to be in the batch"),
        (lambda batch: "y", "to give a tensor from the batch, but got str"),
        (lambda batch: batch[0], "Expected integer labels .* got torch.float32"),
        (lambda batch: batch[1][:3], r"of 8 rows .* got a tensor of shape \(3,\)"),
        (lambda batch: batch[1].unsqueeze(1), r"net\.0"),
    ],
)
def test_labels_that_are_no_labels_are_refused(labels, message):
    with pytest.raises(EstimatorError, match=message):
        fit(net(), dni(estimator=MLP, labels=labels))


# ---- continuous contexts, sequences and none


class Twin:
    """hA + cB + C after every stage but the last, written out; the context is laid beside every position."""

    def __init__(self, module, widths, context_width):
        self.stages = module.net
        self.maps = [nn.Linear(w + context_width, w, dtype=torch.float64) for w in widths]
        for linear in self.maps:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.user = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        self.teacher = ADAM([p for m in self.maps for p in m.parameters()])

    def step(self, x, context, loss_of, divisor):
        inputs, outputs = [x], []
        for stage in self.stages[:-1]:
            outputs.append(stage(inputs[-1]))
            inputs.append(outputs[-1].detach().requires_grad_())
        self.user.zero_grad()
        self.teacher.zero_grad()
        loss_of(self.stages[-1](inputs[-1])).backward()
        incoming = inputs[-1].grad
        for k in reversed(range(len(outputs))):
            h = inputs[k + 1].detach()
            seen = h if context is None else torch.cat([h, context.expand(*h.shape[:-1], -1)], -1)
            synthetic = self.maps[k](seen)
            ((synthetic - incoming * divisor) ** 2).sum().div(len(x)).backward()
            outputs[k].backward(synthetic.detach() / divisor)
            incoming = inputs[k].grad
        self.user.step()
        self.teacher.step()


class Model(pl.LightningModule):
    """Three stages; its loss is a function of batch and output that the test gives."""

    def __init__(self, loss_of, features, width, outputs):
        super().__init__()
        self.loss_of = loss_of
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(features, width), nn.Tanh()),
            nn.Sequential(nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, outputs),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x = batch if isinstance(batch, torch.Tensor) else batch[0]
        return self.loss_of(batch, self(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@dataclass
class Task:
    """A kind of data: its batches, loss, what the estimators see and what the loss is divided by."""

    data: tuple
    outputs: int
    loss: Any
    context: Any
    divisor: Any
    options: dict


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def classes(*shape, low=0):
    return torch.randint(low, CLASSES, shape, generator=torch.Generator().manual_seed(3))


def one_hot(labels):
    return F.one_hot(labels, CLASSES).double()


ROWS, TOKENS, TARGETS = 24, 5, 2
VECTORS, SEQUENCES = (ROWS, FEATURES), (ROWS, TOKENS, FEATURES)
PER_TOKEN = lambda b, out: F.cross_entropy(out.flatten(0, 1), b[1].flatten())
MASKED = lambda b, out: F.cross_entropy(out.flatten(0, 1), b[1].flatten(), ignore_index=-1)
LABELLED = partial(LinearEstimator, num_classes=CLASSES)
CONTINUOUS = partial(LinearEstimator, context_size=TARGETS)

TASKS = {
    "regression, mean over elements": Task(
        (floats(*VECTORS), floats(ROWS, TARGETS)), TARGETS,
        lambda b, out: F.mse_loss(out, b[1]), lambda b: b[1], lambda b: b[1].numel(),
        {"estimator": CONTINUOUS, "loss_denominator": "elements"}),
    "regression, mean over rows": Task(
        (floats(*VECTORS), floats(ROWS, TARGETS)), TARGETS,
        lambda b, out: (out - b[1]).square().sum(1).mean(), lambda b: b[1], lambda b: len(b[0]),
        {"estimator": CONTINUOUS}),
    "regression, sum": Task(
        (floats(*VECTORS), floats(ROWS, TARGETS)), TARGETS,
        lambda b, out: F.mse_loss(out, b[1], reduction="sum") / 8, lambda b: b[1], lambda b: 8.0,
        {"estimator": CONTINUOUS, "loss_denominator": lambda batch, h: 8.0}),
    "regression, no context": Task(
        (floats(*VECTORS), floats(ROWS, TARGETS)), TARGETS,
        lambda b, out: F.mse_loss(out, b[1]), lambda b: None, lambda b: b[1].numel(),
        {"estimator": LinearEstimator, "loss_denominator": "elements"}),
    "labels per token": Task(
        (floats(*SEQUENCES), classes(ROWS, TOKENS)), CLASSES,
        PER_TOKEN, lambda b: one_hot(b[1]), lambda b: b[1].numel(),
        {"estimator": LABELLED, "loss_denominator": lambda batch, h: float(batch[1].numel())}),
    "labels per token, some masked": Task(
        (floats(*SEQUENCES), classes(ROWS, TOKENS, low=-1)), CLASSES,
        MASKED, lambda b: one_hot(b[1].clamp(min=0)), lambda b: int((b[1] >= 0).sum()),
        {"estimator": LABELLED, "labels": lambda b: b[1].clamp(min=0),
         "loss_denominator": lambda batch, h: float((batch[1] >= 0).sum())}),
    "one label per sequence": Task(
        (floats(*SEQUENCES), classes(ROWS)), CLASSES,
        lambda b, out: F.cross_entropy(out.mean(1), b[1]),
        lambda b: one_hot(b[1])[:, None], lambda b: len(b[1]),
        {"estimator": LABELLED}),
    "a target per token": Task(
        (floats(*SEQUENCES), floats(ROWS, TOKENS, TARGETS)), TARGETS,
        lambda b, out: F.mse_loss(out, b[1]), lambda b: b[1], lambda b: b[1].numel(),
        {"estimator": CONTINUOUS, "loss_denominator": "elements"}),
    "soft labels": Task(
        (floats(*VECTORS), floats(ROWS, CLASSES).softmax(1)), CLASSES,
        lambda b, out: F.cross_entropy(out, b[1]), lambda b: b[1], lambda b: len(b[1]),
        {"estimator": partial(LinearEstimator, context_size=CLASSES)}),
    "a context made of several items": Task(
        (floats(*VECTORS), classes(ROWS), floats(ROWS, 1)), CLASSES,
        lambda b, out: F.cross_entropy(out, b[1], reduction="none").mul(b[2][:, 0].exp()).mean(),
        lambda b: torch.cat([one_hot(b[1]), b[2]], 1), lambda b: len(b[1]),
        {"estimator": partial(LinearEstimator, context_size=CLASSES + 1),
         "labels": lambda b: torch.cat([one_hot(b[1]), b[2]], 1)}),
    "nothing but inputs": Task(
        (floats(*VECTORS),), FEATURES,
        lambda b, out: F.mse_loss(out, b), lambda b: None, lambda b: b.numel(),
        {"estimator": LinearEstimator, "labels": None, "loss_denominator": "elements"}),
    "nothing but inputs, looked for": Task(
        (floats(*VECTORS),), FEATURES,
        lambda b, out: F.mse_loss(out, b), lambda b: None, lambda b: b.numel(),
        {"estimator": LinearEstimator, "loss_denominator": "elements"}),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_fit_on_any_data_is_the_hand_written_loop(task):
    task, width = TASKS[task], 7
    data = TensorDataset(*task.data)
    train = DataLoader(data, 10, collate_fn=_alone if len(task.data) == 1 else None)  # the last one is short
    module = Model(task.loss, FEATURES, width, task.outputs).double()
    by_hand = Model(task.loss, FEATURES, width, task.outputs).double()
    by_hand.load_state_dict(module.state_dict())
    context_width = (
        0 if task.context(next(iter(train))) is None else task.context(next(iter(train))).shape[-1]
    )
    twin = Twin(by_hand, [width, width], context_width)
    for batch in 4 * list(train):
        x = batch if isinstance(batch, torch.Tensor) else batch[0]
        twin.step(x, task.context(batch), partial(task.loss, batch), task.divisor(batch))
    strategy = dni(estimator_optimizer=ADAM, **task.options)
    fit(module, strategy, train, max_epochs=4, precision="64-true")
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=0, atol=1e-10)
    for name, linear in zip(("net.0", "net.1"), twin.maps, strict=True):
        ours = strategy.engine.estimators[name].map
        torch.testing.assert_close(ours.weight, linear.weight[:, :width], rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.bias, linear.bias, rtol=0, atol=1e-10)
        assert bool(ours.weight.any())


def _alone(samples):
    return torch.stack([x for (x,) in samples])
