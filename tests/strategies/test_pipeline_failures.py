"""One stage fails in a fit: every other one stops soon, says why, and the last checkpoint is good."""

import ctypes
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fits import BOUNDARIES, AtBatchEnd, BrokenError, Net, fit, loader, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from strategies import failing_fits
from strategies.failing_fits import (
    FAILS_IN,
    SECONDS,
    STAGES,
    faulty,
    faulty_fit,
    happen,
    living,
    run,
    staged,
    trainer_of,
)
from strategies.staged_fits import staged_trainer
from versions import newer_lightning

from lightning_dni import DNIPipelineStrategy, DNIStrategy

QUICK = 1.0
"""Seconds of silence in these tests."""

STEP = f"training_step {FAILS_IN}"
DIED = "BrokenError: nan in layer 7"


def said_of(victim, what, stages=STAGES):
    """The beginning of the error that names the stage."""
    who = rf"Stage {stages - 1 - victim} \(rank {victim}, host \S+\)"
    return rf"^(\[rank\d\]: )?lightning_dni\.errors\.StageError: {who} {what}"


def assert_all_stopped(outcome, victim, what, code=1):
    """Everybody has ended in time; all but the victim with the error that says what it did."""
    for rank in set(range(STAGES)) - {victim}:
        assert re.search(said_of(victim, what), outcome.said[rank], re.M), outcome.said[rank]
        assert outcome.codes[rank] == 1
    assert outcome.codes[victim] == code
    assert max(outcome.seconds) < SECONDS, outcome.seconds


def assert_kept(*steps):
    """These checkpoints are there, and every one can be read."""
    kept = sorted(Path("kept").glob("*.ckpt")) if Path("kept").exists() else []
    assert [path.name for path in kept] == [f"step={step}.ckpt" for step in steps]
    for path, step in zip(kept, steps, strict=True):
        found = torch.load(path, weights_only=True)
        assert found["global_step"] == step
        fit(Net(), DNIStrategy(BOUNDARIES, staged()._options.estimator), ckpt_path=path)


# ---- exceptions


@pytest.mark.parametrize(
    ("victim", "where", "told", "kept"),
    [
        (0, STEP, "training batch 5, step 5", (2, 4)),
        (1, STEP, "training batch 5, step 5", (2, 4)),
        (2, STEP, "training batch 5, step 5", (2, 4)),
        (2, "training_step 0", "training batch 0, step 0", ()),
        (2, "validation_step 1", "validation batch 1, step 4", (2, 4)),
        (1, "on_save_checkpoint", "saving a checkpoint, step 4", (2,)),
        (1, "setup", "start-up", ()),
        (0, "configure_optimizers", "start-up", ()),
        (1, "on_fit_start", "start-up", ()),
    ],
)
def test_an_exception_is_told_everywhere(victim, where, told, kept):
    outcome = run(faulty_fit(failing_fits.die, victim, where))
    assert_all_stopped(outcome, victim, f"failed in {told}: {DIED}")
    for said in outcome.said:  # whatever rank the user looks at
        assert said.rstrip().splitlines()[-1].endswith(DIED)
    assert_kept(*kept)


def test_an_exception_ends_an_exact_schedule():
    exact = {"schedule": "1f1b", "microbatches": 2, "estimator": None}
    outcome = run(faulty_fit(failing_fits.die, 1, STEP, exact))
    assert_all_stopped(outcome, 1, f"failed in training batch 5, step 5: {DIED}")


def test_an_interrupted_stage_is_told_everywhere():
    outcome = run(faulty_fit(failing_fits.interrupt, 1, STEP))
    assert_all_stopped(outcome, 1, "failed in training batch 5, step 5: KeyboardInterrupt")
    assert_kept(2, 4)


def test_a_callback_fails_on_the_last_stage():
    def at(trainer, module, batch_idx):
        if trainer.is_global_zero and batch_idx == FAILS_IN:
            happen(failing_fits.die)

    outcome = run(faulty_fit(None, None, None, callbacks=[AtBatchEnd(at)]))
    assert_all_stopped(outcome, 0, f"failed in training batch 5, step 5: {DIED}")


class Blows(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == FAILS_IN else 1.0)


def test_a_loss_that_is_not_finite_is_told_everywhere():
    def body(rank):
        trainer_of(log_every_n_steps=1).fit(Blows(), loader())

    outcome = run(body)
    for rank in (1, 2):
        assert re.search(said_of(0, "failed in training batch 5, .*finite"), outcome.said[rank], re.M)
    assert outcome.codes == [1, 1, 1]


# ---- processes that die or freeze


@pytest.mark.parametrize(
    ("victim", "where", "kept"),
    [(1, STEP, (2, 4)), (2, "validation_step 1", (2, 4)), (0, "on_save_checkpoint", (2,)), (1, "setup", ())],
)
def test_a_killed_process_is_named(victim, where, kept):
    outcome = run(faulty_fit(failing_fits.kill, victim, where))
    last = "start-up" if where == "setup" else r".*step \d"
    assert_all_stopped(outcome, victim, f"is gone: .* last heard of in {last}", code=-9)
    assert_kept(*kept)


def test_the_stages_go_on_from_the_checkpoint_before_a_kill():
    run(faulty_fit(failing_fits.kill, 1, "on_save_checkpoint"))
    resumed = run(faulty_fit(None, None, None, ckpt_path="kept/step=2.ckpt"))
    assert resumed.codes == [0, 0, 0], resumed.said
    assert_kept(*sorted([2, 4, 6, 8, 10], key=str))


def test_a_copy_of_a_stage_that_is_killed_is_named():
    def body(rank):
        given = staged(boundaries=BOUNDARIES[:1])
        module = faulty(failing_fits.kill, 2, STEP)
        trainer_of(given, 4).fit(module, loader(), loader(16))

    outcome = run(body, 4)
    assert outcome.codes == [1, 1, -9, 1]
    assert max(outcome.seconds) < SECONDS
    for rank in (0, 1, 3):
        assert re.search(r"Stage 0 \(rank 2, host \S+\) is gone", outcome.said[rank]), outcome.said[rank]


@pytest.mark.parametrize(
    ("victim", "where"),
    [(0, STEP), (1, STEP), (1, "validation_step 1"), (0, "on_save_checkpoint"), (1, "setup")],
)
def test_a_frozen_process_is_named_and_ended(victim, where):
    outcome = run(faulty_fit(failing_fits.freeze, victim, where, {"silence": QUICK}))
    assert_all_stopped(outcome, victim, "is frozen: .* is stopped and sends no heartbeat", code=-9)
    assert_kept(*{"setup": (), "on_save_checkpoint": (2,)}.get(where, (2, 4)))


@pytest.mark.parametrize(
    ("victim", "where"),
    [(1, STEP), (0, STEP), (0, "validation_step 1"), (1, "on_save_checkpoint"), (1, "setup")],
)
def test_a_stage_that_loses_its_links_is_named(victim, where):
    outcome = run(faulty_fit(failing_fits.unplug, victim, where, {"silence": QUICK}))
    assert outcome.codes == [1, 1, 1]
    assert max(outcome.seconds) < SECONDS
    rank = f"(rank {victim}[,)]|rank {victim} )"
    for other in {0, 1, 2} - {victim}:
        assert re.search(rf"StageError: .*{rank}", outcome.said[other]), outcome.said[other]
    if where == STEP:
        assert_kept(2, 4)


def hold_lock():
    ctypes.PyDLL(None).usleep(int(2.5e6 * QUICK))


@pytest.mark.parametrize("slow", [partial(time.sleep, 2.5 * QUICK), hold_lock])
def test_a_slow_stage_is_left_alone(slow):
    outcome = run(faulty_fit(slow, 1, STEP, {"silence": QUICK}))
    assert outcome.codes == [0, 0, 0], outcome.said
    assert min(outcome.seconds) > 2 * QUICK


# ---- what others do about an error


class Asks(pl.Callback):
    """Wants all stages to come together about an error."""

    def on_exception(self, trainer, pl_module, exception):
        trainer.strategy.barrier()


@newer_lightning
@pytest.mark.parametrize("first", [True, False])
def test_nobody_waits_for_stages_that_have_stopped(first):
    late = ModelCheckpoint("left", save_on_exception=True, save_on_train_epoch_end=True)
    savers = [OnExceptionCheckpoint("left"), late, Asks()]
    outcome = run(faulty_fit(failing_fits.die, 1, STEP, callbacks=savers if first else savers[:2]))
    assert_all_stopped(outcome, 1, f"failed in training batch 5, step 5: {DIED}")
    assert not list(Path("left").glob("*.ckpt"))


def die_late():
    """The stage below goes on meanwhile, and waits for all stages to save a checkpoint."""
    time.sleep(1.0)
    failing_fits.die()


def fit_twice(rank, first, action):
    with pytest.raises((BrokenError, RuntimeError), match="nan in layer 7"):
        first.fit(faulty(action, 1, STEP), loader())
    module, trainer = Net(), staged_trainer(STAGES)
    before = weights(module)
    trainer.fit(module, loader())
    assert trainer.global_step == 10
    assert not torch.equal(before["net.0.0.weight"], weights(module)["net.0.0.weight"])


def test_stages_that_live_on_can_fit_again():
    outcome = run(lambda rank: fit_twice(rank, staged_trainer(STAGES), failing_fits.die))
    assert outcome.codes == [0, 0, 0], outcome.said


def test_a_stage_that_still_waits_cannot_fit_again():
    outcome = run(lambda rank: fit_twice(rank, trainer_of(), die_late))
    assert outcome.codes == [1, 1, 1]
    assert re.search(r"StageError: Expected a process that waits for nobody.* Start all", outcome.said[2])
    assert max(outcome.seconds) < SECONDS


def test_a_process_that_has_started_the_stages_can_fit_again():
    others = failing_fits.children()  # of other tests in this process

    def trainer():
        return trainer_of(staged(start_method="fork"), callbacks=[])

    with pytest.raises(Exception, match=r"(?s)Stage 1.*nan in layer 7|BrokenError: nan in layer 7"):
        trainer().fit(faulty(failing_fits.die, 1, STEP), loader(), loader(16))
    module, again = Net(), trainer()
    before = weights(module)
    again.fit(module, loader())
    assert not torch.equal(before["net.0.0.weight"], weights(module)["net.0.0.weight"])
    assert [child for child in failing_fits.children() if child not in others] == []


def test_the_limit_is_a_time():
    with pytest.raises(
        MisconfigurationException, match=r"Expected `silence` in seconds, above 0, but got 0\."
    ):
        DNIPipelineStrategy(silence=0.0)


# ---- launchers


def start(launcher, *args):
    """Seconds from the fault to the end of everything, exit code, and what was written."""
    here = Path(__file__).parents[1]
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    script = here / "strategies" / "failing_script.py"
    command = [sys.executable, *launcher, str(script), *args]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    _, said = process.communicate(timeout=2 * failing_fits.GIVEN_UP)
    ended = time.time()
    assert not living([process.pid])
    return ended - float(Path("fault").read_text()), process.returncode, said.decode()


def test_a_child_of_the_launcher_fails():
    seconds, code, said = start([], "1", "die", STEP)
    assert re.search(said_of(1, f"failed in training batch 5, step 5: {DIED}", 2), said, re.M), said
    assert code in (1, -9)  # Lightning's own observer ends its process so, if it comes first
    assert seconds < SECONDS


def test_the_launcher_fails_before_the_processes_know_each_other():
    seconds, code, said = start([], "0", "die", "configure_callbacks")
    assert said.rstrip().splitlines()[-1].endswith(DIED)
    assert code == 1
    assert seconds < SECONDS


def test_a_process_of_torchrun_is_killed():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    seconds, code, said = start(launcher, "1", "kill", STEP)
    assert code == 1
    assert "exitcode  : -9" in said
    assert seconds < SECONDS
