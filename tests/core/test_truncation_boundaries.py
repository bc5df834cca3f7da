"""Boundaries below a truncated module: against both synthetic gradients applied by hand."""

import pytest
import torch
from core.recurrent import BATCH, WIDTH, closely, exactly
from core.truncated_stage import HIDDEN, RATE, Reader, chunks_of, loss_of, stirred, train
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator, ZeroEstimator


def train_by_hand(chunks):
    """The same with plain autograd: SG = h W^T + b at the eyes and at the end of the chunk."""
    net, made = Reader(), {}
    with (
        DNIEngine(
            net,
            ["eyes"],
            lambda spec: made.setdefault(spec.name, stirred(spec)),
            truncations=["core"],
            labels=None,
        ) as engine,
        engine.training_step(),
    ):
        engine.backward(net(chunks[0][0])[0].sum())
    net, state, before, history = Reader(), None, None, []
    at = {name: list(estimator.parameters()) for name, estimator in made.items()}
    for x, y, keep in chunks:
        entered = None if state is None else (state * keep).requires_grad_()
        low = net.eyes(x)
        high = low.detach().requires_grad_()
        out, left = net.core(high, entered)
        h = left[0]
        said_low, said_end = F.linear(low.detach(), *at["eyes"]), F.linear(h.detach(), *at["core"])
        above = {n: p for n, p in net.named_parameters() if not n.startswith("eyes")}
        below = {n: p for n, p in net.named_parameters() if n.startswith("eyes")}
        total = loss_of(net.head(out), y) + (said_end.detach() * h).sum() / BATCH
        inputs = [*above.values(), high, *([] if entered is None else [entered])]
        gradients = torch.autograd.grad(total, inputs)
        found = dict(zip(above, gradients, strict=False))
        found |= dict(
            zip(below, torch.autograd.grad(low, [*below.values()], said_low.detach() / BATCH), strict=True)
        )
        error = (said_low - gradients[len(above)] * BATCH).square().sum() / BATCH
        learnt = dict(zip(("eyes: W", "eyes: b"), torch.autograd.grad(error, at["eyes"]), strict=True))
        if entered is not None:
            target = gradients[-1][0] * BATCH * keep[0]
            error = (F.linear(before, *at["core"]) - target).square().sum() / BATCH
            learnt |= dict(zip(("core: W", "core: b"), torch.autograd.grad(error, at["core"]), strict=True))
        history.append(found | learnt)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter -= RATE * found[name]
            for name, parameters in at.items():
                for parameter, key in zip(parameters, (f"{name}: W", f"{name}: b"), strict=True):
                    parameter -= RATE * learnt.get(key, torch.zeros_like(parameter))
        before, state = h.detach(), left.detach()
    return history


def test_both_synthetic_gradients_are_those_of_a_loop_written_by_hand():
    """What comes back to the boundary has in it what is said at the end of the chunk."""
    chunks = chunks_of(5)
    found, expected = train(stirred, chunks), train_by_hand(chunks)
    renamed = [
        {n.replace("map.weight", "W").replace("map.bias", "b"): g for n, g in f.items()} for f in found
    ]
    assert [len(each) for each in found] == [12] + 4 * [14]
    assert [each.keys() for each in renamed] == [each.keys() for each in expected]
    for ours, theirs in zip(renamed, expected, strict=True):
        closely(ours, theirs)


def test_with_a_zero_estimator_at_the_truncation_the_boundary_is_that_of_the_chunk_alone():
    chunks = chunks_of(4)
    both = train({"eyes": stirred, "core": ZeroEstimator}, chunks)
    alone = train(stirred, chunks, truncations=None)
    for ours, theirs in zip(both, alone, strict=True):
        exactly(ours, theirs)


def test_a_probe_changes_no_number_and_gives_the_boundary_the_gradient_of_its_chunk():
    chunks, probes = chunks_of(3), []
    for probed, plain in zip(train(stirred, chunks, probes), train(stirred, chunks), strict=True):
        exactly(probed, plain)
    assert [sorted(each) for each in probes] == [["eyes"], ["core", "eyes"], ["core", "eyes"]]
    for each in probes:
        closely(each["eyes"].true, each["eyes"].target)
        assert "core" not in each or each["core"].true is None


@pytest.mark.parametrize(
    ("boundary", "match"),
    [
        ("head.0", "'head.0' to lie below truncation 'core'"),
        ("core", "'core' to lie below truncation 'core'"),
    ],
)
def test_a_boundary_above_a_truncation_is_refused(boundary, match):
    with pytest.raises(BoundaryError, match=match):
        train(LinearEstimator, chunks_of(1), boundaries=[boundary])


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(HIDDEN, WIDTH).double()

    def forward(self, x, state=None):
        states = [state]
        for step in x.unbind(1):
            states.append(self.cell(step, states[-1]))
        return torch.stack(states[1:], 1), states[-1]


def test_a_boundary_in_a_truncated_module_is_refused():
    class Wrapped(Reader):
        def __init__(self):
            super().__init__()
            self.core = Deep()

    net = Wrapped()
    engine = DNIEngine(net, ["core.cell"], LinearEstimator, truncations=["core"])
    match = "'core.cell' to lie below truncation 'core'"
    with engine, engine.training_step(), pytest.raises(BoundaryError, match=match):
        net(chunks_of(1)[0][0])
