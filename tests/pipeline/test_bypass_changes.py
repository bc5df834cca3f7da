"""What travels beside the activations, where a later batch does something else than the traced one."""

import copy
from functools import partial

import pytest
import torch
from pipeline.staged import OPTIMIZERS, batches, loss_of
from pipeline.test_bypass import BOUNDARIES, WIDTH, Learned, exact, one_process, split, staged
from pipeline.test_exact import assert_same_bits
from pipeline.test_exact import plain as plain_loop
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.tracing import trace_stages

CLASSES = 3


class Gate(nn.Module):
    """A function of its input that takes no gradient."""

    def forward(self, x, scale=1.0):
        return (x.detach().amax(1, keepdim=True) * scale).sigmoid().expand(-1, WIDTH).clone()


class Gated(nn.Module):
    """Four layers; what `gate` makes before the first one is read by later ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = Gate()
        self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)) * self.gate(x)))


def long_and_short():
    """A batch of 8 rows, and one of 3."""
    short, long = batches(2)
    return [long, short]


def assert_is_one_process(model, data, boundaries=BOUNDARIES):
    split(model, boundaries)
    stages = staged(model, data, boundaries=boundaries)
    losses = [stages.step([batch]) for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(one_process(model, data, boundaries)))
    assert_same_bits(stages, model)


def assert_is_plain_loop(model, data, boundaries=BOUNDARIES):
    split(model, boundaries, skips=True)
    stages = exact(model, data, boundaries=boundaries)
    losses = [stages.step([batch])[0] for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(plain_loop(model, data)))
    assert_same_bits(stages, model)


def assert_refused_in_the_second_batch(model, message, boundaries=BOUNDARIES):
    data, twin = long_and_short(), copy.deepcopy(model)
    plan = trace_stages(twin, boundaries, lambda: loss_of(twin, data[0]))
    check_split(twin, plan, lambda: loss_of(twin, data[0]))
    stages = staged(model, data, boundaries=boundaries)
    stages.step(data[:1])
    with pytest.raises(BoundaryError, match=message):
        stages.step(data[1:])


# ---- one tensor that several modules return


class Fit(nn.Module):
    """Returns what it is given where that fits."""

    def forward(self, gate):
        return gate if len(gate) > 4 else gate * 2


class Fitting(Gated):
    def __init__(self, below):
        super().__init__()
        self.fit, self.below = Fit(), below

    def forward(self, x):
        gate = self.gate(x)
        fitted = self.fit(gate) if self.below else None
        h = self.a(x)
        fitted = self.fit(gate) if fitted is None else fitted
        return self.d(self.c(self.b(h) * gate) * fitted + gate)


@pytest.mark.parametrize("below", [True, False])
def test_modules_that_returned_one_tensor_and_then_two_are_refused(below):
    """One of the two went to the readers of both."""
    assert_refused_in_the_second_batch(
        Fitting(below), r"\['fit', 'gate'\] to return one and the same .* but 'fit' has returned another one"
    )


class Doubled(nn.Linear):
    """Returns one mask twice."""

    def forward(self, x):
        h = super().forward(x)
        mask = (h > 0).to(h.dtype)
        return {"h": h, "mask": mask, "same": mask}


class Twice(Gated):
    """The mask comes out of a boundary twice, and on the next stage out of a module once more."""

    def __init__(self, then):
        super().__init__()
        self.a, self.then = Doubled(5, WIDTH), then

    def forward(self, x):
        out = self.a(x)
        mask = self.then(out["same"])
        return self.d(self.c(self.b(out["h"]) * mask) * mask)


class Halve(nn.Module):
    def forward(self, mask):
        return mask.mul_(0.5)


@pytest.mark.parametrize("then", [nn.Identity(), Halve()])
def test_what_a_boundary_returns_twice_and_a_later_module_again_travels(then):
    assert_is_one_process(Twice(then), batches(4), ["a", "b"])


def test_what_a_module_returns_and_nobody_reads_stays():
    class Hidden(Gated):
        def forward(self, x):
            h = [self.a(x)]
            for layer in (self.b, self.c):
                h.append(layer(h[-1]))
            return self.d(h[-1]), h, self.gate(x)

    def loss_of(model, batch):
        return F.cross_entropy(model(batch[0])[0], batch[1])

    assert split(Hidden(), loss_of=loss_of, skips=True).bypasses == ()


# ---- one module that is called in several places


class Layer(nn.Linear):
    """Calls a module that is not its own."""

    def __init__(self, gate, width=WIDTH):
        super().__init__(width, WIDTH)
        self.gate = gate

    def forward(self, x):
        return super().forward(x) * self.gate(x), self.gate(x, 1.5)


class Shared(Gated):
    """One module inside of a layer below, between the modules, and on the last stage or not."""

    def __init__(self, everywhere):
        super().__init__()
        self.low, self.a, self.everywhere = Layer(self.gate, 5), nn.Linear(WIDTH, WIDTH), everywhere

    def forward(self, x):
        h, low = self.low(x)
        gate = self.gate(x, 3.0)
        h = self.c(self.b(self.a(h)) * low) + gate
        return self.d(self.gate(h) * h if self.everywhere else h)


@pytest.mark.parametrize(
    ("everywhere", "compiled"), [(False, ()), (True, ()), (False, ("low",)), (True, ("low", "gate"))]
)
def test_calls_that_a_later_stage_does_not_see_do_not_count(everywhere, compiled):
    """Those inside of what it skips; it saw them in its first batch, so that a check found nothing."""
    torch.compiler.reset()
    for same in (assert_is_one_process, assert_is_plain_loop):
        model = Shared(everywhere)
        for name in compiled:
            model.get_submodule(name).compile(backend="eager")
        same(model, batches(3), ["a", "b"])
    torch.compiler.reset()


# ---- changes in place


class Changing(Gated):
    """The gate is changed, in small batches, on the first or on the second stage."""

    def __init__(self, stage, always=False):
        super().__init__()
        self.stage, self.always = stage, always

    def forward(self, x):
        gate = self.gate(x)
        changes = self.always or len(x) < 5
        if changes and self.stage == 0:
            gate.mul_(0.5)
        h = self.a(x)
        if changes and self.stage == 1:
            gate.mul_(0.5)
        return self.d(self.c(self.b(h) * gate) * gate)


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_changed_in_place_in_later_batches_is_refused(stage):
    """Else the next stage would have changed it again."""
    message = rf"\['gate'\] return and stage 3 reads not .* but stage {stage} has changed it"
    assert_refused_in_the_second_batch(Changing(stage), message)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_trace_in_inference_mode_sees_changes_in_place(stage):
    """Nothing compares the stages of an evaluation with the whole model."""
    model, batch = Changing(stage, always=True), batches(1)[0]
    with torch.inference_mode():
        plan = trace_stages(model, BOUNDARIES, lambda: loss_of(model, batch), grad=False)
    assert plan.bypasses == ()


# ---- what no module makes


class Around(nn.Module):
    """Lies on two stages, and returns what its code has made on the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.first(x)
        mask = (h > 0) & (h < 1)
        return self.second(h), mask


def test_what_code_has_made_is_refused_though_a_module_returns_it_later():
    class Surrounded(Gated):
        def __init__(self):
            super().__init__()
            self.a = Around()

        def forward(self, x):
            h, mask = self.a(x)
            return self.d(self.b(h) * mask)

    with pytest.raises(BoundaryError, match="tensor from below in what its modules return and later stages"):
        split(Surrounded(), ["a.second", "b"])


def test_more_than_a_message_takes_is_refused_before_anything_is_sent():
    class Many(Gated):
        def forward(self, x):
            gates = self.gate(x)
            return self.d(self.c(self.b(self.a(x))) * sum(gates))

    model = Many()
    model.gate = Columns(31)
    assert len(split(model, ["a"]).bypasses) == 31
    model.gate = Columns(32)
    with pytest.raises(BoundaryError, match=r"past boundary 'a', .* got 1 of its own and 32 .* \['gate'\]"):
        split(model, ["a"])


class Columns(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return [x.detach()[:, :1] * k for k in range(self.count)]


# ---- structure, gradients


class Valued(nn.Module):
    """Decides by values, which later stages do not have."""

    def forward(self, x):
        one, two = x.detach()[:, :1], x.detach()[:, 1:2]
        return {"a": one, "b": two} if x.isfinite().all().item() and len(x) > 4 else {"b": two, "c": one}


def test_another_structure_is_refused():
    class Valuing(Gated):
        def forward(self, x):
            out = self.gate(x)
            return self.d(self.c(self.b(self.a(x)) * out["b"]))

    model = Valuing()
    model.gate = Valued()
    assert_refused_in_the_second_batch(model, "output of 'gate', which stage 2 reads, to be built as when")


def test_what_begins_to_take_a_gradient_does_so_under_exact_schedules():
    torch.manual_seed(0)
    model, data = Learned(), batches(8)
    stages = exact(model, data, boundaries=["a"])
    losses = [stages.step([batch])[0] for batch in data[:4]]
    expected = plain_loop(model, data[:4])
    for each in (model, *stages.models):
        each.rotary.requires_grad_(True)
    stages.optimizers = [OPTIMIZERS["sgd"](each.parameters()) for each in stages.models]
    losses += [stages.step([batch])[0] for batch in data[4:]]
    expected += plain_loop(model, data[4:])
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(stages, model)


# ---- parameters and buffers that are returned themselves


class Table(nn.Module):
    def __init__(self, requires_grad):
        super().__init__()
        self.register_buffer("table", torch.rand(WIDTH))
        if requires_grad is not None:
            del self.table
            self.table = nn.Parameter(torch.rand(WIDTH), requires_grad)

    def forward(self):
        return self.table


class Tabled(Gated):
    def __init__(self, requires_grad=None):
        super().__init__()
        self.gate = Table(requires_grad)

    def forward(self, x):
        table = self.gate()
        return self.d(self.c(self.b(self.a(x))) * table)


def test_a_buffer_travels_itself():
    assert_is_one_process(Tabled(), batches(4))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_parameter_is_named(requires_grad):
    with pytest.raises(StageError, match=r"'gate\.table' is used in stages"):
        split(Tabled(requires_grad), skips=True)


class Counting(nn.Module):
    """Returns a part of a buffer that it changes in every step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(WIDTH))

    def forward(self):
        self.steps += 1
        return self.steps[:WIDTH]


class Counted(Tabled):
    def __init__(self):
        super().__init__()
        self.gate = Counting()


def test_a_message_under_way_is_not_changed_by_later_steps(monkeypatch):
    """A stage runs ahead of the next one, whose messages are sent meanwhile."""
    data, sent = batches(2), []
    stages = staged(Counted(), data, staleness=2, boundaries=["a"])
    first, model = stages.engines[0], stages.models[0]
    monkeypatch.setattr(first._links.activation_out, "send", sent.append)
    for batch in data:
        with first.training_step(batch):
            first.run(partial(loss_of, model, batch))
        first.backward(None)
    assert [message.tensors[1].tolist() for message in sent] == [[1.0] * WIDTH, [2.0] * WIDTH]
