"""Checkpoints, launchers and failures of runs in several processes."""

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from core.nets import assert_close
from ddp_fits import ddp, fit_on_rank, trainers
from fits import (
    BOUNDARIES,
    AtBatchStart,
    different,
    dni,
    net,
    weights,
)
from lightning.pytorch.strategies import DDPStrategy
from processes import TIMEOUT, ReplicaError

from lightning_dni.strategies._compat import MisconfigurationException

# ---- checkpoints

PLAIN = partial(DDPStrategy, timeout=TIMEOUT)
BACKPROP = partial(ddp, bp_lambda=1.0)


def run(rank, make, folder, **options):
    """A fit in double precision, whose checkpoint goes to `folder`."""
    devices = 1 if rank is None else 2
    module = net().double()  # at once: Lightning restores weights before it converts them
    module, trainer = fit_on_rank(
        rank, make(), devices=devices, precision="64-true", module=module, **options
    )
    trainer.save_checkpoint(folder / f"{make.__name__ if make in (ddp, dni) else 'other'}.ckpt")
    return weights(module), trainer.global_step


def run_anywhere(make, folder, **options):
    """What rank 0 has at the end; all ranks have the same."""
    if make is dni:
        return run(None, make, folder, **options)
    (first, steps), (second, _) = trainers(partial(run, **options), make, folder)
    assert different(first, second) == []
    return first, steps


@pytest.mark.parametrize(
    ("before", "after"),
    [(ddp, ddp), (ddp, dni), (dni, ddp), (BACKPROP, PLAIN), (PLAIN, BACKPROP)],
    ids=["ddp-ddp", "ddp-dni", "dni-ddp", "ddp-plain", "plain-ddp"],
)
def test_a_checkpoint_goes_on_in_several_processes_and_in_one_and_under_plain_ddp(before, after, tmp_path):
    run_anywhere(before, tmp_path)
    (path,) = tmp_path.glob("*.ckpt")
    went_on, steps = run_anywhere(after, tmp_path, ckpt_path=path, max_epochs=2)
    whole, _ = run_anywhere(before, tmp_path, max_epochs=2)
    assert steps == 16
    assert_close(went_on, whole, atol=1e-10)


def test_the_checkpoint_is_that_of_one_process(tmp_path):
    run_anywhere(ddp, tmp_path)
    run_anywhere(dni, tmp_path)
    files = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("ddp", "dni")]
    ours, one = (file["lightning_dni"] for file in files)
    assert ours.keys() == one.keys()
    for boundary in BOUNDARIES:
        assert_close(ours["estimators"][boundary], one["estimators"][boundary], atol=1e-10)
    assert ours["optimizers"][0]["param_groups"] == one["optimizers"][0]["param_groups"]


# ---- failures


def spoilt(rank, bp_lambda, whose):
    def spoil(trainer, module, batch_idx):
        if rank == whose and batch_idx == 2:
            with torch.no_grad():
                trainer.strategy.engine.estimators["net.1"].map.weight.fill_(float("nan"))

    fit_on_rank(rank, ddp(bp_lambda=bp_lambda), callbacks=[AtBatchStart(spoil)])


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_estimator_that_is_not_finite_on_one_rank_ends_the_run_everywhere(rank, bp_lambda):
    with pytest.raises(ReplicaError, match=r"at boundary 'net.1' to give finite gradients") as caught:
        trainers(spoilt, bp_lambda, rank, seconds=20)
    assert "hangs" not in str(caught.value)


SCRIPT = """
import sys
from datetime import timedelta
import torch
from fits import AtBatchStart, fit, net
from lightning.pytorch import seed_everything
from ddp_fits import ddp

torch.set_num_threads(1)

def spoil(trainer, module, batch_idx):
    if sys.argv[1] == str(module.global_rank) and batch_idx == 2:
        with torch.no_grad():
            trainer.strategy.engine.estimators["net.1"].map.weight.fill_(float("nan"))

trainer = fit(net(), ddp(), devices=2, callbacks=[AtBatchStart(spoil)])
print(f"rank {trainer.global_rank} has finished at {trainer.global_step}", flush=True)
trainer.strategy.barrier()  # the first to end would take the others along
"""


def launched_by_lightning(spoilt, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "script.py", spoilt],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.mark.slow
def test_lightnings_own_launcher_starts_the_processes(tmp_path):
    done = launched_by_lightning("nobody", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d has finished at 5", done.stdout)) == [
        "rank 0 has finished at 5",
        "rank 1 has finished at 5",
    ]


@pytest.mark.slow
def test_a_failure_in_a_process_that_lightning_has_launched_is_told(tmp_path):
    began = time.monotonic()
    done = launched_by_lightning("1", tmp_path)
    assert done.returncode != 0
    assert "LinearEstimator at boundary 'net.1' to give finite gradients" in done.stderr
    assert time.monotonic() - began < 60


def test_an_empty_bucket_is_refused():
    with pytest.raises(MisconfigurationException, match="`bucket_cap_mb` to be positive, but got 0"):
        ddp(bucket_cap_mb=0.0)
