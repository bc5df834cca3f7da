"""However the processes are started, every one ends with the whole trained module."""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from fits import LINEAR, Net, different, dni, loader, net, quiet_trainer, weights
from processes import free_port
from strategies.staged_fits import BELOW, on_stages, staged, staged_trainer

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from strategies.test_pipeline_launchers import Named, quiet_trainer
from fits import loader
import lightning_dni

torch.manual_seed(0)
module = Named()
options = {{"use_distributed_sampler": False, "num_sanity_val_steps": 0}}
trainer = quiet_trainer("dni_pipeline", devices=2 // {nodes}, num_nodes={nodes}, **options)
torch.manual_seed(0)
trainer.fit(module, loader())
torch.save(module.state_dict(), f"rank{{trainer.global_rank}}.pt")
"""


class Named(Net):
    """Says itself how it is trained."""

    def configure_dni(self):
        return {"boundaries": BELOW[2], "estimator": LINEAR}


def named():
    torch.manual_seed(0)
    return Named()


@cache
def expected():
    """What the stages come to under the launcher of the tests."""

    def body(rank):
        module = named()
        trainer = staged_trainer(strategy="dni_pipeline")
        torch.manual_seed(0)
        trainer.fit(module, loader())
        return weights(module)

    first, second = on_stages(body)
    assert different(first, second) == []
    assert all(different({n: first[n]}, {n: w}) for n, w in weights(named()).items())
    return first


def by_popen():
    return [([], {})]


def by_torchrun(nodes=1):
    """One agent per node, each of which starts its share of two processes."""
    rendezvous = ["--master_addr=localhost", f"--master_port={free_port()}", f"--nnodes={nodes}"]
    agent = ["-m", "torch.distributed.run", *rendezvous, f"--nproc_per_node={2 // nodes}"]
    return [([*agent, f"--node_rank={node}"], {}) for node in range(nodes)]


def by_slurm(nodes=1):
    """What srun tells each task that it starts."""
    job = {
        "SLURM_JOB_ID": str(10_000 + free_port() % 10_000),  # the port is made of it
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": str(2 // nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "localhost",
    }
    return [
        (
            [],
            {
                **job,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % (2 // nodes)),
                "SLURM_NODEID": "0",
            },
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "start"),
    [
        pytest.param(1, by_popen, id="popen"),
        pytest.param(1, by_torchrun, id="torchrun"),
        pytest.param(2, partial(by_torchrun, nodes=2), id="torchrun, two nodes"),
        pytest.param(1, by_slurm, id="slurm"),
        pytest.param(2, partial(by_slurm, nodes=2), id="slurm, two nodes"),
    ],
)
def test_a_script_trains_the_whole_module_on_every_rank(nodes, start, tmp_path):
    tests = Path(__file__).parents[1]
    (tmp_path / "train.py").write_text(SCRIPT.format(tests=str(tests), nodes=nodes))
    paths = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    runs = [
        subprocess.Popen(
            [sys.executable, *before, "train.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, **told},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for before, told in start()
    ]
    try:
        for run in runs:
            _, said = run.communicate(timeout=300)
            assert run.returncode == 0, said[-3000:]
    finally:
        for run in runs:
            run.kill()
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert different(found[0], expected()) == different(found[1], found[0]) == []


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_the_parent_gets_the_whole_module_back(start_method):
    module = named()
    strategy = staged(start_method=start_method)
    trainer = quiet_trainer(strategy, devices=2, use_distributed_sampler=False, num_sanity_val_steps=0)
    torch.manual_seed(0)
    trainer.fit(module, loader())
    assert different(weights(module), expected()) == []


def test_several_fits_and_evaluations_run_on_one_trainer():
    def body(rank, strategy=None):
        module = net()
        options = {"max_epochs": 1, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
        make = staged_trainer if strategy is None else quiet_trainer
        trainer = make(strategy=strategy or staged(staleness=0), **options)
        torch.manual_seed(0)
        trainer.fit(module, loader(), loader(16))
        said = [
            trainer.validate(module, loader(16), verbose=False),
            trainer.test(module, loader(16), verbose=False),
        ]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(), loader(16))
        said.append(trainer.test(module, loader(16), verbose=False))
        return said, weights(module), trainer.global_step

    alone = body(0, dni(boundaries=BELOW[2], rng="stage"))
    for rank, (said, found, step) in enumerate(on_stages(body, seconds=120)):
        assert different(found, alone[1]) == []
        assert step == alone[2] == 20
        assert rank or said == alone[0]
