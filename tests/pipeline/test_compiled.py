"""What torch.compile has wrapped or compiled in place is split as without it."""

import copy

import pytest
import torch
from core.nets import assert_close
from pipeline.chain import buffers_of, grads_of
from pipeline.families import mlp
from pipeline.nets import classify, received, traced, vectors
from torch._dynamo.utils import counters
from torch.nn import functional as F
from versions import newer_torch

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.splitting import StageRunner

BACKEND = "eager"


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module):
    return torch.compile(module, backend=BACKEND)


def wrap_each(model):
    for i, module in enumerate(model):
        model[i] = compiled(module)
    return model


def in_place_each(model):
    for module in model:
        module.compile(backend=BACKEND)
    return model


def in_place_whole(model):
    model.compile(backend=BACKEND)
    return model


def wrap_inside(model):
    for i in range(3):
        model[i][0] = compiled(model[i][0])
    return model


each_arrangement = pytest.mark.parametrize(
    "arrange", [wrap_each, in_place_each, in_place_whole, wrap_inside, compiled], ids=lambda f: f.__name__
)


def run_stages(model, plan, step):
    """All stages one after another; the loss, with gradients in `.grad`."""
    given, taken, value = [], [], None

    def receive():
        taken.append(given[-1].detach().requires_grad_())
        return taken[-1]

    for stage in range(plan.stages):
        with StageRunner(model, plan, stage) as runner:
            last = stage == plan.stages - 1
            value = runner.run(step, receive if stage else None, None if last else given.append)
    value.backward()
    for h, x in zip(reversed(given), reversed(taken), strict=True):
        h.backward(x.grad)
    return value


@each_arrangement
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_compiled_model_is_split(arrange, ran_before):
    plain = mlp().double()
    model, twin = arrange(copy.deepcopy(plain)), plain
    batch = vectors()
    batch = (batch[0].double(), batch[1])
    if ran_before:
        classify(model, batch).backward()
        model.zero_grad()
    plan, step = traced(model, ["0", "2"], batch=batch)
    assert plan.boundaries == ("0", "2")
    assert plan.tensors.keys() == {n for n, _ in plain.named_parameters()}
    assert plan.owner(next(n for n, _ in model.named_parameters())) == 0
    for _ in range(2):
        model.zero_grad()
        loss = run_stages(model, plan, step)
    expected = classify(twin, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    assert_close(grads_of(model), grads_of(twin), atol=1e-14)
    check_split(model, plan, step)
    torch.testing.assert_close(step(), expected, rtol=0, atol=1e-14)
    assert buffers_of(model) == {}


@pytest.mark.parametrize("arrange", [wrap_each, wrap_inside])
def test_compiled_modules_of_the_stage_run_compiled(arrange):
    model = arrange(mlp())
    plan, step = traced(model, ["0", "2"])
    counters.clear()
    with StageRunner(model, plan, 1) as runner:
        runner.run(step, lambda: received(plan, 1), lambda _: None)
    assert counters["frames"]["ok"] > 0


def test_what_was_compiled_in_place_is_what_runs():
    """Something else in its place tells."""
    model = mlp()
    ran = []
    for name, module in model.named_children():
        call = module._call_impl
        module._compiled_call_impl = lambda *args, name=name, call=call: ran.append(name) or call(*args)
    plan, step = traced(model, ["0", "2"])
    assert ran == []
    with StageRunner(model, plan, 1) as runner:
        runner.run(step, lambda: received(plan, 1), lambda _: None)
    assert ran == ["1", "2"]
    step()
    assert ran == ["1", "2", "0", "1", "2", "3"]


@newer_torch
@pytest.mark.parametrize("split", [False, True])
def test_a_compiled_model_is_compiled_again_after_detaching(split):
    model = wrap_each(mlp())
    plan, step = traced(model, ["0", "2"])
    if split:
        with StageRunner(model, plan, 1):
            pass
    counters.clear()
    step()
    assert counters["frames"]["ok"] == 3


def test_copies_of_a_compiled_split_model_are_whole():
    model = wrap_each(mlp())
    plan, step = traced(model, ["0", "2"])
    with StageRunner(model, plan, 1) as runner:
        copies = []
        runner.run(step, lambda: received(plan, 1), lambda _: copies.append(copy.deepcopy(model)))
        batch = vectors()
        assert torch.equal(classify(copies[0], batch), classify(model, batch))
        assert torch.equal(classify(copy.deepcopy(model), batch), classify(model, batch))


def test_a_module_that_is_compiled_while_attached_is_noticed():
    model = mlp()
    plan, step = traced(model, ["0", "2"])
    with StageRunner(model, plan, 1) as runner:
        model[3].compile(backend=BACKEND)
        with pytest.raises(StageError, match=r"no submodule to be compiled while.*a Linear was\. Compile"):
            runner.run(step, lambda: received(plan, 1), lambda _: None)
    assert model[3]._compiled_call_impl is not None


@newer_torch
def test_a_step_that_was_compiled_as_a_whole_is_refused():
    model, batch = mlp(), vectors()
    plan, _ = traced(model, ["0", "2"], batch=batch)
    step = torch.compile(lambda: F.cross_entropy(model(batch[0]), batch[1]), backend=BACKEND)
    step()
    with (
        StageRunner(model, plan, 0) as runner,
        pytest.raises(StageError, match="compile modules rather than"),
    ):
        runner.run(step, None, lambda _: None)


@newer_torch
def test_a_skip_connection_into_a_compiled_module_is_refused():
    class Skipping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.meet = mlp(), compiled(Meeting())

        def forward(self, x):
            low = self.net[0](x)
            return self.net[3](self.meet(self.net[1](low), low))

    class Meeting(torch.nn.Module):
        def forward(self, h, low):
            return h @ (low.T @ low)

    model = Skipping()
    plan, step = traced(model, ["net.1"])
    with StageRunner(model, plan, 1) as runner, pytest.raises(BoundaryError, match="skip connection"):
        runner.run(step, lambda: received(plan, 1))
