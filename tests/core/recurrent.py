"""Recurrent nets of every kind, chunks of sequences, and training on synthetic gradients written by hand."""

from functools import partial

import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from lightning_dni.core import DNIEngine
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.estimators import LinearEstimator

BATCH, LENGTH, FEATURES, WIDTH, OUTPUTS = 4, 3, 2, 3, 2


class FastSlow(nn.Module):
    """A user's cell, with a state of two tensors in a dict."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.GRUCell(FEATURES, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x, memory=None):
        if memory is None:
            memory = {"fast": x.new_zeros(len(x), WIDTH), "slow": x.new_zeros(len(x), 2)}
        fast = self.fast(x, memory["fast"])
        slow = 0.9 * memory["slow"] + torch.tanh(self.slow(fast))
        return torch.cat([fast, slow], 1), {"fast": fast, "slow": slow}


class Stacked(nn.Module):
    """A user's module around nn.GRU, whose state has the batch in its second dimension."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(FEATURES, WIDTH, num_layers=2)

    def forward(self, x, state=None):
        return self.rnn(x, state)


CORES = {
    "lstm": (partial(nn.LSTM, FEATURES, WIDTH, num_layers=2, proj_size=2), 2, False),
    "gru": (partial(nn.GRU, FEATURES, WIDTH), WIDTH, False),
    "lstm cell": (partial(nn.LSTMCell, FEATURES, WIDTH), WIDTH, True),
    "user's cell": (FastSlow, WIDTH + 2, True),
    "user's stack": (Stacked, WIDTH, False),
}
TRUNCATIONS = {"user's stack": {"core": 1}}


class Net(nn.Module):
    """A linear layer on a recurrent `core`; chunks are `[length, batch, features]`."""

    def __init__(self, kind="lstm", seed=0):
        super().__init__()
        make, width, self.steps = CORES[kind]
        self.stacked = not self.steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.core, self.head = make(), nn.Linear(width, OUTPUTS)
        self.double()

    def forward(self, x, state=None):
        if not self.steps:
            out, state = self.core(x, state)
            return self.head(out), state
        outs = []
        for row in x:
            returned = self.core(row, state)
            out, state = (returned[0], returned) if isinstance(self.core, nn.LSTMCell) else returned
            outs.append(self.head(out))
        return torch.stack(outs), state


def draw_chunks(number, seed=0, length=LENGTH, resets=True):
    """Inputs, targets, and which sequences begin anew."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    anew = torch.zeros(number, BATCH, dtype=torch.bool)
    if resets:
        anew[1::2, 1], anew[2::2, 3] = True, True
    return [
        (draw(length, BATCH, FEATURES), draw(length, BATCH, OUTPUTS), anew[k] if k else None)
        for k in range(number)
    ]


def begin_anew(net, state, anew):
    """The state with zeros in the rows of new sequences."""
    if state is None or anew is None:
        return state
    keep = (~anew).view((1, -1, 1) if net.stacked else (-1, 1))
    return pytree.tree_map(lambda s: s * keep.to(s.dtype), state)


def loss_of(out, y):
    """Squared error, summed over time and features, mean over sequences."""
    return (out - y).square().sum((0, 2)).mean()


def rows_of_state(net, state):
    """All tensors of a state side by side, `[batch, features]`."""
    leaves = pytree.tree_leaves(state)
    return torch.cat([(s.movedim(1, 0) if net.stacked else s).flatten(1) for s in leaves], dim=1)


def width_of(net):
    """Number of features of all its state."""
    return rows_of_state(net, net(torch.zeros(1, BATCH, FEATURES).double())[1]).shape[1]


def train_by_hand(
    net, chunks, matrix, bias, rate=0.1, damping=1.0, sequence_end="zero", context_of=lambda y: y[0, :, :0]
):
    """Train `net` and SG = h matrix^T + bias by gradient descent, chunk by chunk.

    Where a sequence begins anew, nothing comes back to the one before it. `context_of(y)` stands beside h.

    Returns:
        The gradients of the net and of the estimator in each chunk; None where it has nothing to learn.
    """
    matrix, bias = matrix.clone().requires_grad_(), bias.clone().requires_grad_()
    parameters = list(net.parameters())
    state, before, history = None, None, []
    for x, y, anew in chunks:
        state = begin_anew(net, state, anew)
        entered = None
        if state is not None:
            entered = pytree.tree_map(lambda s: s.detach().clone().requires_grad_(), state)
        out, left = net(x, entered)
        h = rows_of_state(net, left)
        seen = torch.cat([h.detach(), context_of(y)], dim=1)
        said = (seen @ matrix.t() + bias).detach()
        total = loss_of(out, y) + damping * (said * h).sum() / BATCH
        inputs = [] if entered is None else pytree.tree_leaves(entered)
        found = torch.autograd.grad(total, [*parameters, *inputs])
        learnt = None
        if before is not None:
            arrived = pytree.tree_unflatten(found[len(parameters) :], pytree.tree_flatten(entered)[1])
            target = rows_of_state(net, arrived) * BATCH
            goes_on = torch.ones(BATCH).double() if anew is None else (~anew).double()
            target = target * goes_on.unsqueeze(1)
            error = (before @ matrix.t() + bias - target).square().sum(1)
            if sequence_end == "ignore":
                error = error * goes_on
            learnt = torch.autograd.grad(error.sum() / BATCH, [matrix, bias])
        history.append((found[: len(parameters)], learnt))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=False):
                parameter -= rate * gradient
            for parameter, gradient in zip([matrix, bias], learnt or (), strict=False):
                parameter -= rate * gradient
        before, state = seen, pytree.tree_map(lambda s: s.detach().clone(), left)
    return history


def engine_of(net, estimator, kind="lstm", **options):
    """An engine at `core` that trains its estimators by gradient descent."""
    descent = partial(torch.optim.SGD, lr=0.1)
    truncations = TRUNCATIONS.get(kind, ["core"])
    return DNIEngine(
        net, [], estimator, truncations=truncations, **{"estimator_optimizer": descent, **options}
    )


def train(net, engine, chunks, rate=0.1, state=None, detach=True, history=None):
    """Train the same with an engine that is attached.

    Returns:
        The gradients as `train_by_hand` gives them, and the state.
    """
    history = [] if history is None else history
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    for x, y, anew in chunks:
        state = begin_anew(net, state, anew)
        optimizer.zero_grad()
        with engine.training_step((x, y)):
            out, state = net(x, state)
            loss = loss_of(out, y)
        engine.backward(loss)
        if detach:
            state = pytree.tree_map(torch.Tensor.detach, state)
        learnt = [p.grad for e in engine.estimators.values() for p in e.parameters() if p.grad is not None]
        history.append(([p.grad.clone() for p in net.parameters()], [g.clone() for g in learnt] or None))
        optimizer.step()
        engine.update_estimators()
    return history, state


class Told(GradientEstimator):
    """Says what it is told to say, a list with one gradient per chunk."""

    def __init__(self, spec, says):
        super().__init__()
        self.says = iter(says)

    def synthesize(self, h, context, state):
        return next(self.says), None


exactly = partial(assert_close, rtol=0, atol=0)
closely = partial(assert_close, rtol=1e-10, atol=1e-10)


def stirred(spec, seed=3):
    """A linear estimator that no longer says zero."""
    estimator = LinearEstimator(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in estimator.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return estimator


def stirred_weights(net):
    """What `stirred` begins with."""
    made = []
    engine = engine_of(net, lambda spec: made.append(stirred(spec)) or made[-1], truncations_of(net))
    with engine:
        train(net, engine, draw_chunks(1))
    return [p.detach().clone() for p in made[0].parameters()]


def truncations_of(net):
    return next(k for k, (make, *_) in CORES.items() if type(net.core) is getattr(make, "func", make))


def weights(engine):
    return [list(e.state_dict().values()) for e in engine.estimators.values()]
