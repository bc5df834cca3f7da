"""A stage runs on the user's own modules, which stay what they are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from pipeline.families import mlp
from pipeline.nets import classify, received, run_stage, traced, vectors
from torch.nn import functional as F

from lightning_dni.errors import StageError
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
