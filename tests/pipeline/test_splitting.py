"""A stage runs on the user's own modules, which stay what they are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from core.nets import same_bits
from pipeline.chain import buffers_of, grads_of
from pipeline.families import FAMILIES, Branching, cnn, images, mlp
from pipeline.nets import Net, block, classify, received, run_stage, traced, vectors
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.splitting import StageDone, StageRunner


def attributes(model):
    things = [*model.modules(), *model.parameters(), *model.buffers()]
    return [sorted(vars(thing)) for thing in things]


@pytest.fixture(name="split")
def _split():
    model = mlp()
    plan, step = traced(model, ["0", "2"])
    return model, plan, step


def test_only_the_modules_of_the_stage_run(split):
    model, plan, step = split
    ran = []
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda module, args, output, name=name: type(args[0]) is torch.Tensor and ran.append(name)
        )
    for stage, expected in enumerate([["0"], ["1", "2"], ["3"]]):
        ran.clear()
        run_stage(model, plan, stage, step)
        assert ran == expected


def test_a_stage_gives_the_output_of_its_upper_boundary(split):
    model, plan, step = split
    h = received(plan, 1)
    with StageRunner(model, plan, 1) as runner:
        given = []
        assert runner.run(step, lambda: h, given.append) is None
    assert torch.equal(given[0], model[2](model[1](h)))
    assert given[0].requires_grad


def test_the_last_stage_returns_what_the_step_returns(split):
    model, plan, step = split
    h = received(plan, 2)
    with StageRunner(model, plan, 2) as runner:
        loss = runner.run(step, lambda: h)
    assert torch.equal(loss, F.cross_entropy(model[3](h), torch.arange(6) % 3))


@pytest.mark.parametrize("stage", range(3))
def test_the_model_stays_whole_outside_of_a_run(split, stage):
    model, plan, step = split
    before, keys, names = step(), list(model.state_dict()), [n for n, _ in model.named_parameters()]
    with StageRunner(model, plan, stage):
        assert torch.equal(step(), before)
        assert list(model.state_dict()) == keys
        assert [n for n, _ in model.named_parameters()] == names
        assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_of_a_split_model_are_whole_also_in_a_run(split, copied):
    model, plan, _ = split
    clean, batch = attributes(model), vectors()
    expected, twins = classify(model, batch), []

    def copying():
        loss = classify(model, batch)
        twins.append(copied(model))
        return loss

    with StageRunner(model, plan, 2) as runner:
        twins.append(copied(model))
        runner.run(copying, lambda: received(plan, 2))
    assert len(twins) == 2
    for twin in twins:
        assert attributes(twin) == clean
        assert torch.equal(classify(twin, batch), expected)


def test_nothing_is_left_after_detaching(split):
    model, plan, step = split
    before = attributes(model)
    runner = StageRunner(model, plan, 1)
    for _ in range(2):
        runner.attach()
        runner.attach()
        runner.run(step, lambda: received(plan, 1), lambda _: None)
        runner.detach()
        runner.detach()
        assert attributes(model) == before


def test_an_exception_of_the_user_passes_and_leaves_nothing(split):
    model, plan, _ = split
    before = attributes(model)

    def failing():
        model[0](torch.ones(6, 5))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), StageRunner(model, plan, 2) as runner:
        runner.run(failing, lambda: received(plan, 2))
    assert attributes(model) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_an_exception_of_an_end_passes_and_the_runner_goes_on(split):
    model, plan, step = split

    def failing(*_):
        raise ConnectionError

    with StageRunner(model, plan, 1) as runner:
        for ends in ((failing, lambda _: None), (lambda: received(plan, 1), failing)):
            with pytest.raises(ConnectionError):
                runner.run(step, *ends)
        given = []
        runner.run(step, lambda: received(plan, 1), given.append)
    assert len(given) == 1


def test_context_managers_of_the_user_unwind(split):
    model, plan, step = split

    def within():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return step()

    run_stage(model, plan, 0, within)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_what_ends_a_run_is_not_an_exception_of_the_users(split):
    model, plan, step = split

    def careful():
        try:
            return step()
        except Exception:
            return None

    _, given = run_stage(model, plan, 0, careful)
    assert len(given) == 1
    assert not issubclass(StageDone, Exception)


def test_a_bare_except_is_found_out(split):
    model, plan, step = split

    def careless():
        try:
            return step()
        except:  # noqa: E722
            return torch.zeros(())

    with pytest.raises(StageError, match=r"stage 0 to end at boundary '0', but the step caught.*Write"):
        run_stage(model, plan, 0, careless)


def test_a_device_context_that_the_user_keeps_open_is_his(split):
    model, plan, step = split
    modes = []

    def within():
        with torch.device("cpu"):
            loss = step()
            modes.append(len(torch.overrides._get_current_function_mode_stack()))
            return loss

    h = received(plan, 2)
    with StageRunner(model, plan, 2) as runner:
        loss = runner.run(within, lambda: h)
    assert torch.equal(loss, F.cross_entropy(model[3](h), torch.arange(6) % 3))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_no_mode_is_on_where_the_stage_computes(split):
    model, plan, step = split
    modes = []
    model[3].register_forward_pre_hook(
        lambda *_: modes.append(len(torch.overrides._get_current_function_mode_stack()))
    )
    run_stage(model, plan, 2, step)
    assert modes == [0]


def test_activations_are_free_as_soon_as_their_owner_drops_them(split):
    model, plan, step = split
    gc.collect()
    gc.disable()
    try:
        _, given = run_stage(model, plan, 0, step)
        h = weakref.ref(given[0])
        given.clear()
        assert h() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("stage", "ends", "says"),
    [
        (0, (lambda: 0, lambda _: 0), r"`receive` to be None on stage 0 of 3"),
        (0, (None, None), r"`emit` to be given on stage 0 of 3, but got None"),
        (1, (None, lambda _: 0), r"`receive` to be given on stage 1 of 3, but got None"),
        (2, (lambda: 0, lambda _: 0), r"`emit` to be None on stage 2 of 3"),
    ],
)
def test_a_stage_has_the_ends_that_it_needs(split, stage, ends, says):
    model, plan, step = split
    with StageRunner(model, plan, stage) as runner, pytest.raises(StageError, match=says):
        runner.run(step, *ends)


def test_a_runner_has_to_be_attached(split):
    model, plan, step = split
    with pytest.raises(StageError, match=r"stage 0 to be attached, but got a run before\. Call"):
        StageRunner(model, plan, 0).run(step, None, lambda _: None)


def test_one_run_at_a_time(split):
    model, plan, step = split
    with (
        StageRunner(model, plan, 0) as runner,
        pytest.raises(StageError, match=r"one run of stage 0 at a time"),
    ):
        runner.run(lambda: runner.run(step, None, lambda _: None), None, lambda _: None)


def test_one_runner_per_model(split):
    model, plan, step = split
    before = attributes(model)
    with StageRunner(model, plan, 0) as runner:
        with pytest.raises(StageError, match=r"another split answers for a Linear in it\. Call `detach\(\)`"):
            StageRunner(model, plan, 1).attach()
        given = []
        runner.run(step, None, given.append)
        assert len(given) == 1
    assert attributes(model) == before


def test_there_is_no_such_stage(split):
    model, plan, _ = split
    with pytest.raises(StageError, match=r"`stage` in \[0, 3\).*but got 3"):
        StageRunner(model, plan, 3)


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


def test_gradients_reach_the_stages_own_parameters_and_its_input_only(split):
    model, plan, step = split
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
