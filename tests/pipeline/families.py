"""One small model of every kind that a pipeline has to split, with boundaries and a step."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_dni.demos.gpt import GPT
from lightning_dni.demos.resnet import ResNet

CLASSES = 3


class Family(NamedTuple):
    make: object
    boundaries: list
    batch: object
    step: object


def vectors(rows=6):
    return torch.randn(rows, 5), torch.arange(rows) % CLASSES


def images(rows=4):
    return torch.randn(rows, 3, 8, 8), torch.arange(rows) % CLASSES


def tokens(rows=3):
    x = torch.randint(0, 11, (rows, 7))
    return x, x.roll(-1, 1)


def sequences(rows=3):
    return torch.randn(rows, 7, 8), torch.arange(rows) % CLASSES


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def block(a, b):
    return nn.Sequential(nn.Linear(a, b), nn.Tanh())


def mlp():
    return nn.Sequential(block(5, 6), block(6, 6), block(6, 6), nn.Linear(6, CLASSES))


def nested():
    lower = nn.Sequential(block(5, 6), nn.Sequential(block(6, 6), block(6, 6)))
    return nn.Sequential(lower, nn.Sequential(block(6, 6), nn.Linear(6, CLASSES)))


class Net(nn.Module):
    """Four parts, called `a` to `d`, put together by `forward`."""

    def __init__(self, a=None, b=None, c=None, d=None):
        super().__init__()
        self.a, self.b = a or block(5, 6), b or block(6, 6)
        self.c, self.d = c or block(6, 6), d or nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


def convolution(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(0.2))


def cnn():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return Net(convolution(3, 4), convolution(4, 6), convolution(6, 6), head)


class Encoder(nn.Module):
    """torch's own transformer, which reads its layers' attributes and passes a mask to each."""

    def __init__(self, dropout=0.1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.encoder(x, mask=mask).mean(1))


class Positions(Net):
    """A parameter, a mutated and a constant buffer of the container, used between its modules."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x):
        scale = self.scale[:6] * 2
        h = self.a(x) + self.position
        self.steps += 1
        self.average.mul_(0.9).add_(h.detach().mean(0))
        h = torch.cat([h[:, :3], self.position[3:].expand(len(h), 3) + h[:, 3:]], 1) - self.average
        return self.d(self.c(self.b(h) * scale) * scale)


class Masked(Net):
    """An input of the batch that a later stage uses again."""

    def forward(self, x, mask):
        h = self.c(self.b(self.a(x * mask)))
        return self.d(h * mask[:, :1])


def masked_step(model, batch):
    return F.cross_entropy(model(batch[0], (batch[0] > -1).float()), batch[1])


class Recurrent(nn.Module):
    """A boundary that returns a tensor and a tuple of states."""

    def __init__(self):
        super().__init__()
        self.lower, self.upper = nn.LSTM(8, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        h, states = self.lower(x)
        h, (last, _) = self.upper(h, states)
        return self.head(h.mean(1) + last[0])


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, h, scale=1.0):
        return {"h": self.linear(h) * scale, "rest": [h.tanh(), (h > 0), None], "name": "b"}


class Keyed(Net):
    """Dictionaries cross, and the model returns one."""

    def __init__(self):
        super().__init__(b=Dictionary())

    def forward(self, x, *, labels=None):
        out = self.b(self.a(x), scale=0.5)
        h = self.c(out["h"] + out["rest"][0]) * out["rest"][1]
        logits = self.d(h)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h):
        h = self.up(h) if h.mean() > 0 else self.up(-h)
        return self.down(h) if h.std().item() > 0.01 else h


class Branches(Net):
    """Branches on values: inside a module of each stage, and above the boundary in the container."""

    def __init__(self):
        super().__init__(b=Branching())

    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        return self.d(h if h.mean() > 0 else -2 * h)


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on threefold."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return torch.round(h * 8) / 8

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * (ctx.saved_tensors[0].abs() < 1)


class Rounded(Net):
    def forward(self, x):
        h = Straight.apply(self.b(Straight.apply(self.a(x))))
        return self.d(Straight.apply(self.c(h)))


def normed():
    return Net(
        parametrizations.weight_norm(nn.Linear(5, 6)),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh()),
        parametrizations.weight_norm(nn.Linear(6, CLASSES)),
    )


class Checkpointed(Net):
    def __init__(self):
        super().__init__(*(nn.Sequential(block(n, 6), nn.Dropout(0.2)) for n in (5, 6, 6)))

    def forward(self, x):
        h = x.clone().requires_grad_()
        for part in (self.a, self.b, self.c):
            h = checkpoint(part, h, use_reentrant=False)
        return self.d(h)


def in_bfloat16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return classify(model, batch)


def frozen():
    model = mlp()
    model[0].requires_grad_(False)[0].bias.requires_grad_()
    model[2].requires_grad_(False)
    return model


def drawn(model, batch):
    """Noise drawn by the step before the model runs, as in a diffusion model, and used in its loss."""
    noise = torch.randn(len(batch[0]), CLASSES)
    return F.mse_loss(model(batch[0] + noise.mean()), noise)


def unused():
    model = Net()
    model.spare = nn.Linear(2, 2)
    model.spares = nn.ModuleList([nn.Linear(2, 2)])
    return model


class Shared(nn.Module):
    """One activation module everywhere, and a block called twice in one stage."""

    def __init__(self):
        super().__init__()
        self.act, self.first, self.twice = nn.GELU(), nn.Linear(5, 6), nn.Linear(6, 6)
        self.cut, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.act(self.twice(h)) + self.act(self.twice(2 * h))
        return self.head(self.act(self.cut(h)))


def gpt(dropout=0.1):
    return GPT(vocabulary=11, context_length=8, width=8, heads=2, layers=4, dropout=dropout)


def keyed_step(model, batch):
    return model(batch[0], labels=batch[1])


FAMILIES = {
    "mlp": Family(mlp, ["0", "2"], vectors, classify),
    "nested": Family(nested, ["0.1.0", "0.1", "1.0"], vectors, classify),
    "cnn": Family(cnn, ["a", "b.1", "c"], images, classify),
    "encoder": Family(Encoder, ["encoder.layers.0", "encoder.layers.1"], sequences, classify),
    "encoder-exact": Family(lambda: Encoder(0.0), ["encoder.layers.1"], sequences, classify),
    "gpt-2": Family(gpt, ["block_1"], tokens, next_token),
    "gpt-4": Family(gpt, ["block_0", "block_1", "block_2"], tokens, next_token),
    "gpt-inside": Family(gpt, ["embedding", "block_1", "head.0"], tokens, next_token),
    "resnet": Family(lambda: ResNet(1, 3, CLASSES, 4), ["block_0", "block_1"], images, classify),
    "positions": Family(Positions, ["a", "b", "c"], vectors, classify),
    "mask": Family(Masked, ["a", "b"], vectors, masked_step),
    "lstm": Family(Recurrent, ["lower"], sequences, classify),
    "dictionary": Family(Keyed, ["a", "b"], vectors, keyed_step),
    "branches": Family(Branches, ["a", "b"], vectors, classify),
    "function": Family(Rounded, ["a", "b"], vectors, classify),
    "normed": Family(normed, ["a", "b", "c"], vectors, classify),
    "checkpointed": Family(Checkpointed, ["a", "b"], vectors, classify),
    "bfloat16": Family(mlp, ["0", "1"], vectors, in_bfloat16),
    "frozen": Family(frozen, ["0", "1", "2"], vectors, classify),
    "drawn": Family(mlp, ["0", "2"], vectors, drawn),
    "unused": Family(unused, ["a", "b"], vectors, classify),
    "shared": Family(Shared, ["first", "cut"], vectors, classify),
}
