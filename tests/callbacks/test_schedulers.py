"""Lambda schedules: their values, their course through a fit, checkpoints, YAML and refusals."""

import pickle

import lightning.pytorch as pl
import pytest
import torch
from callbacks.runs import csv_rows, rows_with
from fits import BOUNDARIES, AtBatchStart, different, dni, fit, loader, net, weights
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger

from lightning_dni.callbacks import Alternation, BPLambdaScheduler, LinearWarmup, StepLambda

SCHEDULES = {
    "warm-up": (LinearWarmup(4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]),
    "warm-up to a part": (LinearWarmup(2, start=0.0, end=0.5), [0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5]),
    "steps": (StepLambda({5: 0.1, 2: 0.5}), [1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1]),
    "steps from the first": (StepLambda({0: 0.5, 1: 0.0}, initial=0.9), [0.5] + [0.0] * 6),
    "alternation": (Alternation(2), [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]),
}
each_schedule = pytest.mark.parametrize(("schedule", "expected"), SCHEDULES.values(), ids=SCHEDULES)


class Constant:
    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value


class Course(pl.Callback):
    """The lambda of every training forward pass, as the engine has it."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append(trainer.strategy.engine.bp_lambda)


def course(schedule, scheduler=None, **options):
    recorder, scheduler = Course(), scheduler or BPLambdaScheduler(schedule)
    options = {"max_steps": 7, "strategy": dni(), **options}
    trainer = fit(net(), callbacks=[scheduler, recorder], **options)
    return recorder.seen, scheduler, trainer


def everywhere(values):
    return [dict.fromkeys(BOUNDARIES, value) for value in values]


@each_schedule
def test_schedule_takes_its_course_in_a_fit(schedule, expected):
    seen, scheduler, _ = course(schedule)
    assert seen == everywhere(expected)
    assert scheduler.last_step == 6
    assert scheduler.get_last_lambda() == everywhere(expected)[-1]


@each_schedule
def test_schedule_is_the_same_after_pickling(schedule, expected):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert [copy(step) for step in range(7)] == expected


def test_lambda_holds_for_all_micro_batches_of_a_step():
    seen, _, _ = course(LinearWarmup(4), max_steps=3, accumulate_grad_batches=2, train=loader(batch_size=4))
    assert seen == everywhere([1.0, 1.0, 0.75, 0.75, 0.5, 0.5])


def test_boundaries_may_differ_and_the_rest_keeps_its_lambda():
    seen, _, _ = course({"net.1": LinearWarmup(2)}, max_steps=3, strategy=dni(bp_lambda=0.3))
    assert seen == [{"net.0": 0.3, "net.1": value} for value in (1.0, 0.5, 0.0)]


def test_first_pattern_that_matches_decides():
    seen, _, _ = course({"net.0": Constant(0.25), "*": Constant(0.5)}, max_steps=1)
    assert seen == [{"net.0": 0.25, "net.1": 0.5}]


def test_before_the_first_step_nothing_was_scheduled():
    scheduler = BPLambdaScheduler(LinearWarmup(4))
    assert (scheduler.last_step, scheduler.get_last_lambda()) == (-1, {})


def test_alternation_trains_as_the_hand_made_sequence():
    by_hand = [0.0, 0.0, 1.0] * 4

    def set_lambda(trainer, module, batch_idx):
        trainer.strategy.engine.set_bp_lambda(by_hand[trainer.global_step])

    runs = []
    for callback in (BPLambdaScheduler(Alternation(2)), AtBatchStart(set_lambda)):
        module = net()
        fit(module, dni(), callbacks=[callback])
        runs.append(weights(module))
    assert different(*runs) == []


def test_values_are_logged_with_lightnings_rows():
    logger = CSVLogger(".")
    course(LinearWarmup(4), logger=logger, log_every_n_steps=2)
    rows = csv_rows(logger)
    assert rows_with(rows, "dni_bp_lambda/net_0") == rows_with(rows, "loss") == [1, 3, 5]
    assert [rows[s]["dni_bp_lambda/net_1"] for s in (1, 3, 5)] == [0.75, 0.25, 0.0]


# ---- checkpoints


@pytest.mark.parametrize("strategy", ["dni", "plain"])
def test_course_goes_on_after_resuming(strategy):
    """Also from a checkpoint that holds the scheduler, but no engine."""
    epoch = {"train": loader(40), "max_steps": -1}  # 5 steps
    _, scheduler, trainer = course(LinearWarmup(8), max_epochs=1, **epoch)
    trainer.save_checkpoint("half.ckpt")
    if strategy == "plain":
        checkpoint = torch.load("half.ckpt", weights_only=True)
        del checkpoint["lightning_dni"]
        torch.save(checkpoint, "half.ckpt")
    resumed = BPLambdaScheduler(LinearWarmup(8))
    seen, _, _ = course(None, resumed, max_epochs=2, ckpt_path="half.ckpt", **epoch)
    assert seen == everywhere([0.375, 0.25, 0.125, 0.0, 0.0])
    assert (scheduler.last_step, resumed.last_step) == (4, 9)


def test_state_is_restored_as_a_torch_schedulers():
    _, scheduler, _ = course(LinearWarmup(8))
    other = BPLambdaScheduler(LinearWarmup(8))
    other.load_state_dict(scheduler.state_dict())
    assert other.last_step == scheduler.last_step == 6
    assert other.get_last_lambda() == scheduler.get_last_lambda() == dict.fromkeys(BOUNDARIES, 0.25)


def test_resuming_within_an_accumulated_batch_sets_lambda_again():
    """The engine is new there, and the step is the one that was scheduled last."""
    scheduler = BPLambdaScheduler(Constant(0.5))
    scheduler.load_state_dict({"last_step": 0, "last_lambda": dict.fromkeys(BOUNDARIES, 0.5)})
    seen, _, _ = course(None, scheduler, max_steps=1)
    assert seen == everywhere([0.5])


# ---- YAML

LINEAR = {"class_path": "lightning_dni.callbacks.LinearWarmup", "init_args": {"num_steps": 4}}
STEPS = {"class_path": "lightning_dni.callbacks.StepLambda", "init_args": {"milestones": {"2": 0.5}}}
ALTERNATION = {"class_path": "lightning_dni.callbacks.Alternation", "init_args": {"synthetic_steps": 2}}


@pytest.mark.parametrize("schedule", [LINEAR, STEPS, ALTERNATION, {"net.0": LINEAR, "*": ALTERNATION}])
@pytest.mark.parametrize("mode", ["yaml", "omegaconf+"])
def test_schedules_come_from_yaml(schedule, mode):
    parser = ArgumentParser(parser_mode=mode)
    parser.add_subclass_arguments(pl.Callback, "callback")
    path = "lightning_dni.callbacks.BPLambdaScheduler"
    given = {"callback": {"class_path": path, "init_args": {"schedule": schedule}}}
    callback = parser.instantiate(parser.parse_object(given)).callback
    seen, _, _ = course(None, callback, max_steps=1)
    assert seen[0]["net.0"] == {id(LINEAR): 1.0, id(STEPS): 1.0, id(ALTERNATION): 0.0}.get(id(schedule), 1.0)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearWarmup(0), r"Expected `num_steps` to be an integer of at least 1, but got 0"),
        (lambda: LinearWarmup(4, start=1.5), r"Expected `start` to be a lambda in \[0, 1\], but got 1.5"),
        (lambda: LinearWarmup(4, end=-0.1), r"Expected `end` to be a lambda in \[0, 1\], but got -0.1"),
        (lambda: StepLambda({}), r"Expected `milestones` to be a non-empty mapping"),
        (lambda: StepLambda({3: 2.0}), r"Expected `milestones\[3\]` to be a lambda in \[0, 1\], but got 2.0"),
        (lambda: StepLambda({-1: 0.5}), r"Expected `step -1 of milestones` to be an integer of at least 0"),
        (lambda: StepLambda({1: 0.5}, initial=float("nan")), r"Expected `initial` .* but got nan"),
        (lambda: Alternation(0), r"Expected `synthetic_steps` to be an integer of at least 1, but got 0"),
        (lambda: BPLambdaScheduler(LinearWarmup), r"Expected `schedule` to be a callable .* but got <class"),
        (lambda: BPLambdaScheduler({"*": Alternation}), r"Expected `schedule\['\*'\]` .* but got <class"),
        (lambda: BPLambdaScheduler({}), r"Expected `schedule` to hold at least one schedule"),
    ],
)
def test_bad_arguments_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("value", [1.5, -0.25, float("nan"), None])
def test_values_outside_the_range_are_refused_in_training(value):
    match = rf"Expected `schedule\(0\)` to be a lambda in \[0, 1\], but got {value}"
    with pytest.raises(ValueError, match=match):
        course(Constant(value))


def test_pattern_that_matches_no_boundary_is_refused():
    match = r"Expected the patterns in `schedule` to match boundaries, but 'net.7' matches none of"
    with pytest.raises(MisconfigurationException, match=match):
        course({"net.7": Constant(0.5)})


def test_strategy_without_engine_is_refused_by_name():
    with pytest.raises(
        MisconfigurationException, match=r"for BPLambdaScheduler, but got SingleDeviceStrategy"
    ):
        course(Constant(0.5), strategy="auto")
