"""What the modules do of which a stage runs some and skips the others."""

import copy

import pytest
import torch
from core.nets import same_bits
from pipeline.chain import buffers_of, grads_of
from pipeline.families import FAMILIES, Branching, cnn, images, mlp
from pipeline.nets import Net, block, classify, received, run_stage, traced, vectors
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.splitting import StageRunner


class Sometimes(Net):
    """Runs `extra` in some steps, and `b` in most."""

    def __init__(self):
        super().__init__()
        self.extra, self.runs_extra, self.runs_b = nn.Linear(6, 6), False, True

    def forward(self, x):
        h = self.a(x)
        h = self.extra(h) if self.runs_extra else h
        h = self.b(h) if self.runs_b else h
        return self.d(self.c(h))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_module_that_did_not_run_when_traced_runs_on_its_stage_only(stage):
    model = Sometimes()
    plan, step = traced(model, ["b", "c"])
    model.runs_extra = True
    with pytest.raises(
        StageError, match=rf"'extra' to run on stage 2, but it ran on stage {stage}.*Trace a step"
    ):
        run_stage(model, plan, stage, step)


@pytest.mark.parametrize(("stage", "boundary"), [(0, "b"), (1, "b")])
def test_a_boundary_that_does_not_run_is_named(stage, boundary):
    model = Sometimes()
    plan, step = traced(model, ["b"])
    model.runs_b = False
    with pytest.raises((StageError, BoundaryError), match=rf"boundary '{boundary}'|module '"):
        run_stage(model, plan, stage, step)


class Again(Net):
    again = None

    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        if self.again is not None:
            getattr(self, self.again)(x if self.again == "a" else h)
        return self.d(h)


@pytest.mark.parametrize(
    ("again", "says"), [("a", "a run of 'a', a module below it"), ("b", "a second run of")]
)
def test_what_belongs_below_does_not_run_after_the_input_has_arrived(again, says):
    model = Again()
    plan, step = traced(model, ["b"])
    model.again = again
    with pytest.raises(BoundaryError, match=rf"below boundary 'b' but its output, but got {says}.*Choose"):
        run_stage(model, plan, 1, step)


def test_skipped_modules_are_run_on_shapes_once_per_signature():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.count = nn.Linear(5, 6), 0

        def forward(self, x):
            self.count += 1
            return self.linear(x)

    model = Net(a=Counting())
    plan, step = traced(model, ["b"])
    model.a.count = 0
    counts = []
    with StageRunner(model, plan, 1) as runner:
        for rows in (6, 6, 4, 6, 4):
            runner.run(
                lambda rows=rows: classify(model, vectors(rows)), lambda rows=rows: received(plan, 1, rows)
            )
            counts.append(model.a.count)
        model.eval()
        runner.run(step, lambda: received(plan, 1))
    assert counts == [1, 1, 2, 2, 2]
    assert model.a.count == 3


@pytest.mark.parametrize("rows", [6, 4])
def test_a_skipped_module_that_needs_values_has_the_shapes_of_the_trace(rows):
    shapes = []

    class Watching(Net):
        def forward(self, x):
            h = self.a(x)
            shapes.append((tuple(h.shape), h.dtype))
            return super().forward(x)

    model = Watching(a=nn.Sequential(block(5, 6), Branching()))
    plan, step = traced(model, ["b"])
    run_stage(model, plan, 0, step)
    shapes.clear()
    with StageRunner(model, plan, 1) as runner:
        runner.run(lambda: classify(model, vectors(rows)), lambda: received(plan, 1, rows))
    assert shapes == [((rows, 6), torch.float32)]


class Opaque(nn.Module):
    def __init__(self, numbers=False):
        super().__init__()
        self.linear, self.numbers = nn.Linear(5, 6), numbers

    def forward(self, x):
        h = self.linear(x)
        return (h, h.mean().item()) if self.numbers else (h, iter([h]))


@pytest.mark.parametrize("numbers", [False, True])
def test_a_skipped_module_whose_output_cannot_be_known_is_refused(numbers):
    class Opening(Net):
        def forward(self, x):
            h, _ = self.a(x)
            return self.d(self.c(self.b(h)))

    model = Opening(a=Opaque(numbers))
    plan, step = traced(model, ["b"])
    with pytest.raises(
        BoundaryError, match=r"an output of 'a', a module below it, whose shape cannot be known.*Choose"
    ):
        run_stage(model, plan, 1, step)


def test_other_stages_buffers_and_random_numbers_are_left_alone():
    model = cnn()
    batch = images()
    plan, step = traced(model, ["a", "b"], batch=batch)
    before, state = buffers_of(model), torch.get_rng_state()
    with StageRunner(model, plan, 2) as runner:
        runner.run(step, lambda: torch.rand(4, 6, 8, 8).requires_grad_())
    below = {n: b for n, b in before.items() if plan.owner(n) < 2}
    assert same_bits({n: b for n, b in buffers_of(model).items() if n in below}, below)
    assert not torch.equal(torch.get_rng_state(), state)


def test_buffers_that_the_container_replaces_stay_tensors_with_values():
    class Averaging(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(6))

        def forward(self, x):
            h = self.a(x)
            self.average = 0.9 * self.average + h.detach().mean(0)
            return self.d(self.c(self.b(h)))

    model = Averaging()
    plan, step = traced(model, ["b"])
    before = model.average.clone()
    run_stage(model, plan, 1, step)
    assert torch.equal(model.average, before)
    run_stage(model, plan, 0, step)
    assert not torch.equal(model.average, before)


def test_gradients_reach_the_stages_own_parameters_and_its_input_only():
    model = mlp()
    plan, step = traced(model, ["0", "2"])
    h = received(plan, 1)
    with StageRunner(model, plan, 1) as runner:
        runner.run(step, lambda: h, lambda output: output.sum().backward())
    assert h.grad is not None
    assert {n for n, g in grads_of(model).items() if g is not None} == {
        n for n, _ in model.named_parameters() if plan.owner(n) == 1
    }


def test_foreign_parameters_may_be_without_values():
    model = FAMILIES["encoder"].make()
    batch = FAMILIES["encoder"].batch()
    plan, step = traced(model, ["encoder.layers.0"], batch=batch)
    expected = copy.deepcopy(model)
    h = torch.rand(3, 7, 8, requires_grad=True)
    state = torch.get_rng_state()
    with StageRunner(expected, plan, 1) as runner:
        loss = runner.run(lambda: classify(expected, batch), lambda: h)
    model.encoder.layers[0].to("meta")
    torch.set_rng_state(state)
    with StageRunner(model, plan, 1) as runner:
        assert torch.equal(runner.run(step, lambda: h), loss)


@pytest.mark.parametrize("region", ["own", "lower", "both"])
def test_checkpoints_run_again_in_the_backward_pass(region):
    class Checkpoints(Net):
        def forward(self, x):
            h = self.a(x.clone().requires_grad_())
            again = torch.utils.checkpoint.checkpoint
            if region == "own":
                h = again(self.c, self.b(h), use_reentrant=False)
            else:
                h = self.c(again(self.b, h, use_reentrant=False))
            return self.d(h)

    model = Checkpoints(*(nn.Sequential(block(n, 6), nn.Dropout(0.3)) for n in (5, 6, 6)))
    plan, step = traced(model, ["b"] if region == "own" else ["a"])
    h = received(plan, 1)
    with StageRunner(model, plan, 1) as runner:
        state = torch.get_rng_state()
        loss = runner.run(step, lambda: h)
        loss.backward()
        if region == "both":
            runner.run(step, lambda: received(plan, 1)).backward()
    torch.set_rng_state(state)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    x = h.detach().requires_grad_()
    lower = twin.c(x) if region == "own" else twin.c(twin.b(x))
    F.cross_entropy(twin.d(lower), torch.arange(6) % 3).backward()
    assert torch.equal(h.grad, x.grad)
