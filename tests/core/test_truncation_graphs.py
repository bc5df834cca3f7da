"""Truncations in graphs of other forms: changed in place, checkpointed, branched, merged, frozen."""

import pytest
import torch
from core.recurrent import (
    BATCH,
    FEATURES,
    OUTPUTS,
    WIDTH,
    Net,
    closely,
    draw_chunks,
    engine_of,
    exactly,
    stirred,
    stirred_weights,
    train,
    train_by_hand,
    weights,
)
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lightning_dni.core import DNIEngine
from lightning_dni.core.continuity import PATIENCE
from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.estimators import LinearEstimator


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_state_that_is_detached_in_place_before_the_loss_comes_back_gets_its_synthetic_gradient(kind):
    chunks, found = draw_chunks(3), []
    for in_place in (False, True):
        net = Net(kind)

        def forward(x, state=None, net=net, in_place=in_place):
            out, state = Net.forward(net, x, state)
            if in_place:
                for tensor in pytree.tree_leaves(state):
                    tensor.detach_()
            return out, state

        net.forward = forward
        engine = engine_of(net, stirred, kind)
        with engine:
            found.append((train(net, engine, chunks)[0], weights(engine)))
    exactly(found[1], found[0])


class Checkpointed(Net):
    """Whose core saves no activations: every call of it, or all of them at once."""

    def __init__(self, kind, at_once):
        super().__init__(kind)
        self.at_once = at_once

    def forward(self, x, state=None):
        if self.at_once:
            return checkpoint(super().forward, x, state, use_reentrant=False)
        if not self.steps:
            out, state = checkpoint(self.core, x, state, use_reentrant=False)
            return self.head(out), state
        outs = []
        for row in x:
            returned = checkpoint(self.core, row, state, use_reentrant=False)
            out, state = (returned[0], returned) if isinstance(self.core, nn.LSTMCell) else returned
            outs.append(self.head(out))
        return torch.stack(outs), state


@pytest.mark.parametrize("at_once", [False, True], ids=["every call", "all at once"])
@pytest.mark.parametrize("kind", ["lstm", "lstm cell", "user's cell"])
def test_a_checkpointed_core_gets_the_gradients_of_a_loop_written_by_hand(kind, at_once):
    ours, twin, chunks = Checkpointed(kind, at_once), Net(kind), draw_chunks(4)
    expected = train_by_hand(twin, chunks, *stirred_weights(Net(kind)))
    engine = engine_of(ours, stirred, kind)
    with engine:
        found, _ = train(ours, engine, chunks)
    closely(found, [(list(net), learnt and list(learnt)) for net, learnt in expected])
    closely(list(ours.parameters()), list(twin.parameters()))


class Branching(nn.Module):
    """A cell that reads two inputs from one state, and then, if `merges`, from what comes of both."""

    def __init__(self, merges):
        super().__init__()
        self.merges = merges
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.core, self.head = nn.GRUCell(FEATURES, WIDTH), nn.Linear(WIDTH, OUTPUTS)
        self.double()

    def forward(self, x, state=None):
        ends = [self.core(x[0], state), self.core(x[1], state)]
        if self.merges:
            ends = [self.core(x[2], 0.5 * (self.core(x[2], ends[0]) + ends[1]))]
            ends = [self.core(x[1], ends[0])]
        return self.head(sum(ends)), ends


@pytest.mark.parametrize("merges", [False, True], ids=["branched", "merged"])
def test_what_comes_back_to_a_state_from_two_branches_is_one_target(merges):
    """A synthetic gradient at every end; the state goes on from the first one."""
    ours, twin, chunks = Branching(merges), Branching(merges), draw_chunks(4, resets=False)
    (matrix, bias), state, before, expected = stirred_weights(Net("gru")), None, None, []
    for x, y, _ in chunks:
        entered = None if state is None else state.clone().requires_grad_()
        twin.zero_grad()
        out, ends = twin(x, entered)
        said = [(end @ matrix.t() + bias).detach() for end in ends]
        loss = (out - y[0]).square().sum(1).mean()
        (loss + sum((g * end).sum() for g, end in zip(said, ends, strict=True)) / BATCH).backward()
        expected.append([p.grad.clone() for p in twin.parameters()])
        if before is not None:
            error = before @ matrix.t() + bias - entered.grad * BATCH
            matrix = matrix - 0.2 * error.t() @ before / BATCH
            bias = bias - 0.2 * error.mean(0)
        before = state = ends[0].detach()
    engine, state = engine_of(ours, stirred, sequence_end="ignore"), None
    with engine:
        for (x, y, _), gradients in zip(chunks, expected, strict=True):
            ours.zero_grad()
            with engine.training_step():
                out, ends = ours(x, state)
                loss = (out - y[0]).square().sum(1).mean()
            engine.backward(loss)
            closely([p.grad for p in ours.parameters()], gradients)
            engine.update_estimators()
            state = ends[0].detach()
    closely(weights(engine)[0], [matrix, bias])


def test_a_truncation_whose_state_needs_no_gradient_is_refused():
    net, (chunk, _) = Net("gru"), draw_chunks(2)
    net.core.requires_grad_(False)
    engine = engine_of(net, LinearEstimator)
    with (
        engine,
        pytest.raises(BoundaryError, match=r"to need a gradient, but .* those of \['core'\] is trained"),
    ):
        train(net, engine, [chunk])


class Detaches(nn.GRU):
    """As modules do that are made for truncated backprop."""

    def forward(self, x, state=None):
        out, state = super().forward(x, state)
        return out, state.detach()


def test_a_module_that_detaches_its_state_itself_is_told_so():
    """Where a step holds several losses it may as well be frozen for a while: that is told later."""
    net, chunks = Net("gru"), draw_chunks(PATIENCE)
    net.core = Detaches(FEATURES, WIDTH).double()
    engine = engine_of(net, LinearEstimator)

    def train_manually():
        state = None
        for x, _, _ in chunks:
            with engine.training_step(several_losses=True):
                out, state = net(x, state)
                engine.backward(out.sum())

    with engine:
        with pytest.raises(BoundaryError, match="or the module detaches them itself"):
            train(net, engine, chunks[:1])
        with pytest.warns(UserWarning, match="No sequence has gone on at truncation 'core'"):
            train_manually()


def test_a_truncation_inside_another_is_refused():
    with pytest.raises(
        BoundaryError, match=r"Expected no truncation inside another, but got 'core\.rnn' in 'core'"
    ):
        DNIEngine(Net("user's stack"), [], LinearEstimator, truncations={"core": 1, "core.rnn": 1})


def test_a_loss_that_is_differentiated_another_way_is_refused():
    """It would have had no synthetic gradient."""
    net, (chunk, _) = Net("gru"), draw_chunks(2)
    engine = engine_of(net, LinearEstimator)
    with engine:
        _, state = train(net, engine, [chunk])
        with (
            pytest.raises(StageError, match="to be differentiated by `manual_backward`"),
            engine.training_step(several_losses=True),
        ):
            net(chunk[0], state)[0].sum().backward()


class Clockwork(nn.Module):
    """A cell whose slow state moves in every other step, and is handed on as it came in the others."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.GRUCell(FEATURES, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x, state):
        fast, slow, step = state
        fast = self.fast(x, fast)
        slow = torch.tanh(slow + self.slow(fast)) if step % 2 else slow
        return torch.cat([fast, slow], 1), (fast, slow, step + 1)


def clockwork():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({"core": Clockwork(), "eyes": nn.Linear(FEATURES, 2)}).double()


def test_two_branches_are_handed_on_the_same_tensor():
    """Each of them has an end: the tensor's last reader does not go on from the first."""

    def ends_of(net):
        begin = (torch.zeros(BATCH, WIDTH).double(), net["eyes"](x[0]), 0)
        _, (fast, slow, _) = net["core"](x[0], begin)
        return [net["core"](row, (fast, slow, 2))[0] for row in x[1:]]

    ours, twin, x = clockwork(), clockwork(), draw_chunks(1)[0][0]
    engine = DNIEngine(ours, [], stirred, truncations=["core"], labels=None)
    with engine:
        with engine.training_step():
            loss = sum(end.square().sum() for end in ends_of(ours)) / BATCH
        engine.backward(loss)
    matrix, bias = (p.detach() for p in engine.estimators["core"].parameters())
    ends = ends_of(twin)
    said = [(end @ matrix.t() + bias).detach() for end in ends]
    total = sum((end.square() + g * end).sum() for end, g in zip(ends, said, strict=True))
    (total / BATCH).backward()
    closely([p.grad for p in ours.parameters()], [p.grad for p in twin.parameters()])


def test_a_state_that_is_handed_on_as_it_came_may_be_detached_in_place():
    net, rows = clockwork(), draw_chunks(1)[0][0]
    engine = DNIEngine(net, [], stirred, truncations=["core"], labels=None, sequence_end="ignore")
    state = (torch.zeros(BATCH, WIDTH).double(), torch.zeros(BATCH, 2).double(), 0)
    with engine:
        for x in rows:
            engine.request_report()
            with engine.training_step():
                out, state = net["core"](x, state)
                loss = out.square().sum()
            engine.backward(loss)
            for tensor in state[:2]:
                tensor.detach_()
    assert len(engine.last_report.boundaries["core"].target) == BATCH
