"""Hooks are there while they are needed, gone afterwards, and dead on copies."""

import copy
import io

import pytest
import torch
from core.nets import CLASSES, Told, assert_close, attached, blobs, grads, mlp, run_step
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.core.tap import Taps
from lightning_dni.estimators import LinearEstimator

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def hooks(model):
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in HOOKS)


def attributes(model):
    things = [*model.modules(), *model.parameters(), *model.buffers()]
    return [sorted(vars(thing)) for thing in things]


def test_hooks_are_there_inside_the_block_only():
    model = mlp()
    with DNIEngine(model, ["0", "1"], Told):
        assert hooks(model) == 3
    assert hooks(model) == 0


def failing_run(model, batch, where):
    with DNIEngine(model, ["0", "1"], Told) as engine:
        with engine.training_step(batch):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            _ = 1 / (where != "forward")
        _ = 1 / (where != "between")
        engine.backward(loss)
        raise ZeroDivisionError


@pytest.mark.parametrize("where", ["forward", "between", "after"])
def test_hooks_are_gone_after_an_exception(where):
    model, batch = mlp(), blobs()
    with pytest.raises(ZeroDivisionError):
        failing_run(model, batch, where)
    assert hooks(model) == 0
    model(batch[0]).sum().backward()
    assert model[0][0].weight.grad is not None


def test_a_hook_of_the_users_stays():
    model = mlp()
    model[0].register_forward_hook(lambda *args: None)
    with DNIEngine(model, ["0"], Told):
        pass
    assert hooks(model) == 1


@pytest.mark.parametrize("bp_lambda", [0.0, 1.0])
def test_nothing_of_ours_is_ever_on_the_model(bp_lambda):
    model, batch = mlp(batch_norm=True), blobs()
    before, during = attributes(model), []
    model[2].register_forward_hook(lambda *args: during.append(attributes(model)))
    with DNIEngine(model, ["0", "1"], LinearEstimator, bp_lambda=bp_lambda) as engine:
        for _ in range(3):
            engine.request_probe()
            run_step(engine, model, batch)
            engine.update_estimators()
    assert all(seen == before for seen in (*during, attributes(model)))
    assert len(during) == 3


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_hooked_model_is_not_cut(copied):
    model, batch = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double(), blobs()
    engine = attached(model, ["1"])
    copy_ = copied(model)
    with engine.training_step(batch):
        F.cross_entropy(copy_(batch[0]), batch[1]).backward()
    engine.detach()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert_close(grads(copy_), grads(model), atol=0)


def test_an_engine_can_be_attached_again():
    model, batch = mlp(), blobs()
    engine = DNIEngine(model, ["0"], Told)
    for _ in range(3):
        with engine:
            run_step(engine, model, batch)
        engine.detach()
    assert hooks(model) == 0


def test_taps_pass_on_what_a_callback_returns():
    layer, taps = nn.Identity(), Taps()
    taps.attach(layer, {}, None, lambda output: output + 1)
    assert taps.installed
    assert layer(torch.zeros(1)).item() == 1
    taps.remove()
    assert not taps.installed
    assert layer(torch.zeros(1)).item() == 0
