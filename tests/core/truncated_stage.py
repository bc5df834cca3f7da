"""A net with a boundary below a truncated module, trained with both synthetic gradients."""

import torch
from core.recurrent import BATCH, FEATURES, LENGTH, OUTPUTS, WIDTH
from torch import nn

from lightning_dni.core import DNIEngine
from lightning_dni.estimators import LinearEstimator

HIDDEN, RATE = 5, 0.1


class Reader(nn.Module):
    """Two layers per step, a GRU, and a head of two layers; chunks are `[batch, length, features]`."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.eyes = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
            self.core = nn.GRU(HIDDEN, WIDTH, batch_first=True)
            self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS))
        self.double()

    def forward(self, x, state=None):
        out, state = self.core(self.eyes(x), state)
        return self.head(out), state


def chunks_of(number):
    """Inputs, targets, and which sequences go on."""
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH, LENGTH, FEATURES), (BATCH, LENGTH, OUTPUTS)
    chunks = [[torch.randn(shape, generator=generator).double() for shape in shapes] for _ in range(number)]
    goes_on = torch.ones(number, 1, BATCH, 1).double()
    goes_on[2:3, :, 1] = 0.0
    return [(x, y, keep) for (x, y), keep in zip(chunks, goes_on, strict=True)]


def loss_of(out, y):
    return (out - y).square().sum() / len(y)


def stirred(spec):
    estimator = LinearEstimator(spec)
    generator = torch.Generator().manual_seed(len(spec.name))
    with torch.no_grad():
        for p in estimator.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return estimator


def train(estimator, chunks, probes=None, **options):
    """The gradients of net and estimators in every chunk, by name, and the engine's."""
    net, state, history = Reader(), None, []
    descent = lambda parameters: torch.optim.SGD(parameters, lr=RATE)
    given = {"boundaries": ["eyes"], "truncations": ["core"], "labels": None, **options}
    engine = DNIEngine(net, estimator=estimator, estimator_optimizer=descent, **given)
    optimizer = descent(net.parameters())
    with engine:
        for x, y, keep in chunks:
            optimizer.zero_grad()
            if probes is not None:
                engine.request_probe()
            with engine.training_step((x, y)):
                out, state = net(x, None if state is None else state.detach() * keep)
                loss = loss_of(out, y)
            engine.backward(loss)
            found = {n: p.grad for n, p in net.named_parameters()}
            for name, made in engine.estimators.items():
                found |= {f"{name}: {n}": p.grad for n, p in made.named_parameters()}
            history.append({n: g.clone() for n, g in found.items() if g is not None})
            if probes is not None:
                probes.append(engine.last_report.boundaries)
            optimizer.step()
            engine.update_estimators()
    return history
