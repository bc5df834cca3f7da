"""A ResNet and a GPT cut at every block: backprop at lambda 1, the estimators' word alone at 0."""

import copy
from functools import partial

import pytest
import torch
from core.nets import Told, assert_close, attached, grads, run_step, same_bits, weights
from fits import fit
from oracles import decoupled_backward
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni import DNIStrategy
from lightning_dni.demos import GPT, GPTLanguageModel, ResNet, ResNetClassifier
from lightning_dni.estimators import ConvEstimator, LinearEstimator

TOKENS = 7
RESNET = {"n": 1, "width": 4, "num_classes": 3}
GPT_SIZES = {"vocabulary": TOKENS, "context_length": 6, "width": 8, "heads": 2, "layers": 3, "dropout": 0.25}
LEARNED = {
    "resnet": partial(ConvEstimator, hidden_channels=(4,), kernel_size=3, num_classes=3),
    "gpt": partial(LinearEstimator, num_classes=TOKENS),
}
NETS = {"resnet": lambda: ResNet(**RESNET), "gpt": lambda: GPT(**GPT_SIZES)}
MODULES = {
    "resnet": lambda: ResNetClassifier(**RESNET, optimizer="sgd", learning_rate=0.1),
    "gpt": lambda: GPTLanguageModel(**GPT_SIZES, optimizer="sgd", learning_rate=0.1),
}
each_net = pytest.mark.parametrize("kind", NETS)


class Constant(Told):
    """Says the same for every row, whatever it sees."""

    def __init__(self, spec):
        super().__init__(
            spec, lambda h: torch.linspace(-1, 1, h[0].numel(), dtype=h.dtype).view_as(h[:1]).expand_as(h)
        )


def data(kind, rows=4):
    generator = torch.Generator().manual_seed(5)
    if kind == "resnet":
        return torch.randn(rows, 3, 8, 8, generator=generator), torch.arange(rows) % 3
    text = torch.randint(TOKENS, (rows, 7), generator=generator)
    return text[:, :-1], text[:, 1:]


def batch_of(kind, dtype=torch.float64):
    x, y = data(kind)
    return (x.to(dtype) if x.is_floating_point() else x), y


def loss_of(scores, y):
    return F.cross_entropy(scores.movedim(-1, 1), y)


def cuts(net):
    """Every block but the head."""
    return [name for name, _ in net.named_children()][:-1]


@each_net
@pytest.mark.parametrize("learned", [False, True])
def test_full_lambda_is_backprop_to_the_bit(kind, learned):
    model, batch = NETS[kind](), batch_of(kind, torch.float32)
    twin = copy.deepcopy(model)
    engine = attached(model, cuts(model), LEARNED[kind] if learned else Told, bp_lambda=1.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step)
        loss = run_step(engine, model, batch, loss_of)
        torch.manual_seed(step)
        plain = loss_of(twin(batch[0]), batch[1])
        plain.backward()
        assert torch.equal(loss, plain)
        assert same_bits(grads(model), grads(twin))
        for optimizer in optimizers:
            optimizer.step()
        engine.update_estimators()
    assert same_bits(weights(model), weights(twin))


@each_net
def test_full_lambda_is_backprop_in_the_trainer(kind):
    def trained(strategy):
        torch.manual_seed(0)
        module = MODULES[kind]()
        trainer = fit(module, strategy, DataLoader(TensorDataset(*data(kind, 12)), 4))
        assert trainer.global_step == 3
        return {**weights(module), "loss": trainer.callback_metrics["train_loss"]}

    boundaries = [f"net.{name}" for name in cuts(NETS[kind]())]
    decoupled = DNIStrategy(boundaries=boundaries, estimator=LEARNED[kind], bp_lambda=1.0)
    assert same_bits(trained(decoupled), trained("auto"))


@each_net
@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("estimator", [Told, Constant])
def test_every_stage_gets_what_the_oracle_gives_it(kind, bp_lambda, estimator):
    model, (x, y) = NETS[kind]().double(), batch_of(kind)
    twin, names = copy.deepcopy(model), cuts(model)
    engine = attached(model, names, estimator, bp_lambda=bp_lambda)
    torch.manual_seed(1)
    loss = run_step(engine, model, (x, y), loss_of)
    torch.manual_seed(1)
    said = [estimator(None).rule] * len(names)
    stages = nn.ModuleList(twin.children())
    expected, _ = decoupled_backward(stages, x, lambda out: loss_of(out, y), said, [bp_lambda] * len(names))
    assert torch.equal(loss, expected)
    assert_close(grads(model), grads(twin), atol=1e-13)
    assert same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))


@each_net
def test_nothing_of_the_true_gradient_passes_a_cut(kind):
    """Whatever the loss, the stages below the last cut get the same bits."""
    found = []
    for factor in (1.0, -1e3):
        torch.manual_seed(0)
        model, batch = NETS[kind](), batch_of(kind, torch.float32)
        engine = attached(model, cuts(model), Constant)
        run_step(engine, model, batch, lambda scores, y, factor=factor: factor * loss_of(scores, y))
        found.append(grads(model))
    one, other = ({n: g for n, g in each.items() if not n.startswith("head")} for each in found)
    assert same_bits(one, other)
    assert all(g.any() for g in one.values())
    assert not same_bits(*found)


@each_net
def test_probes_are_backprop(kind):
    """What a probe calls the true gradient is plain backprop's."""
    model, (x, y) = NETS[kind]().double(), batch_of(kind)
    twin, seen = copy.deepcopy(model), {}
    engine = attached(model, cuts(model))
    engine.request_probe()
    torch.manual_seed(1)
    run_step(engine, model, (x, y), loss_of)
    torch.manual_seed(1)
    h = x
    for name, block in twin.named_children():
        h = seen[name] = block(h)
        h.retain_grad()
    loss_of(h, y).backward()
    for name, report in engine.last_report.boundaries.items():
        true = seen[name].grad.flatten(1) * len(x)
        torch.testing.assert_close(report.true, true, rtol=0, atol=1e-13)
