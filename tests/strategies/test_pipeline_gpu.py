"""Stages on real GPUs: the numbers of one process there, and on each device only a stage's own part.

Every fit runs in a fresh interpreter's process, as a fork cannot use CUDA.
"""

import multiprocessing
import os
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from fits import LINEAR, Losses, Net, different, loader, net, quiet_trainer, weights
from processes import free_port
from torch import nn

from lightning_dni import DNIPipelineStrategy, DNIStrategy

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a CUDA device")]
several = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")

BOUNDARY = ["net.0"]
WIDE = 2048
"""Width at which a layer has 16 MiB of weights: more than an allocator rounds away."""


def on_gpus(body, *args, processes=2, shared=False, seconds=300):
    """`[body(rank, *args) for each rank]`, in processes that all see one GPU, or each its own.

    Where they share a GPU each is a node of its own, of one device, for a Trainer with `num_nodes`.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    with context.Pool(processes) as pool:
        jobs = [
            pool.apply_async(_on_gpu, (rank, processes, port, shared, body, args))
            for rank in range(processes)
        ]
        return [job.get(seconds) for job in jobs]


def _on_gpu(rank, processes, port, shared, body, args):
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PL_GLOBAL_SEED": "0"}
    if shared:
        os.environ |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}
    else:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests",
        }
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return body(rank, *args)


def trainer_of(shared, strategy, **options):
    """A Trainer of one of two processes."""
    devices = {"devices": 1, "num_nodes": 2} if shared else {"devices": 2}
    return quiet_trainer(strategy, accelerator="gpu", use_distributed_sampler=False, **{**devices, **options})


def staged(shared, **options):
    backend = "gloo" if shared else None
    return DNIPipelineStrategy(
        **{"boundaries": BOUNDARY, "estimator": LINEAR, "process_group_backend": backend, **options}
    )


def on_host(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def fit_one(rank, make, fit):
    """One process on one GPU that does what the stages do together."""
    module, losses = make(), Losses()
    strategy = DNIStrategy(boundaries=BOUNDARY, estimator=LINEAR, rng="stage")
    trainer = quiet_trainer(
        strategy, accelerator="gpu", devices=1, callbacks=[losses], **{"max_epochs": 2, **fit}
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(), loader(16))
    return on_host(weights(module)), losses.train


def fit_stage(rank, shared, make, options, fit):
    module, losses = make(), Losses()
    trainer = trainer_of(
        shared,
        staged(shared, **options),
        callbacks=[losses] if rank == 0 else [],
        **{"max_epochs": 2, **fit},
    )
    torch.manual_seed(0)
    trainer.fit(module, loader(), loader(16))
    return on_host(weights(module)), losses.train


def same_run(shared, make, fit, tolerance):
    """Two stages and one process end with the same weights, which have all moved."""
    found = on_gpus(fit_stage, shared, make, {"staleness": 0}, fit, shared=shared)
    ((expected, losses),) = on_gpus(fit_one, make, fit, processes=1)
    start = weights(make())
    for own, _ in found:
        for name, value in expected.items():
            torch.testing.assert_close(own[name], value, atol=tolerance, rtol=tolerance)
        assert len(different(own, start)) == len(start)
        assert different(own, found[0][0]) == []
    assert found[0][1] == pytest.approx(losses, abs=tolerance)
    assert len(losses) == 20


MAKES = {
    "plain": net,
    "adam, batch norm": partial(net, optimizer="adam", batch_norm=True),
    "dropout": partial(net, dropout=0.2),
}


@pytest.mark.parametrize("kind", MAKES)
def test_two_stages_that_share_a_gpu_are_one_process_on_it(kind):
    same_run(True, MAKES[kind], {}, 1e-6)


def test_mixed_precision_is_that_of_one_process():
    same_run(True, net, {"precision": "bf16-mixed"}, 1e-6)


@pytest.mark.parametrize("options", [{"staleness": 2}, {"schedule": "1f1b", "microbatches": 2}], ids=str)
def test_stages_that_share_a_gpu_learn(options):
    options = {**({"estimator": None} if "schedule" in options else {}), **options}
    found = on_gpus(fit_stage, True, net, options, {"max_epochs": 10}, shared=True)
    losses = found[0][1]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert different(found[0][0], found[1][0]) == []


# ---- only what a stage holds is on its device


class Wide(Net):
    """Four times 16 MiB in `net.0`, twice 16 MiB above it."""

    def __init__(self):
        super().__init__(optimizer="adam")
        below = [nn.Linear(6, WIDE), *(nn.Linear(WIDE, WIDE) for _ in range(4))]
        above = [nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3)]
        self.net = nn.Sequential(nn.Sequential(*below), nn.Sequential(*above))


class Looks(pl.Callback):
    """Where everything is while the fit runs, and how much of the device it takes."""

    def __init__(self):
        self.before, self.devices, self.states, self.peak, self.module_device = [], {}, set(), 0, ""

    def on_train_start(self, trainer, module):
        self.before = sorted({p.device.type for p in module.parameters()})
        self.module_device = module.device.type

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.devices = {name: p.device.type for name, p in module.named_parameters()}
        self.states = {
            t.device.type
            for state in trainer.optimizers[0].state.values()
            for key, t in state.items()
            if key != "step"
        }
        self.peak = torch.cuda.max_memory_allocated()


def look(rank, shared, path):
    looks, module = Looks(), Wide()
    strategy = staged(shared, staleness=1)
    trainer = trainer_of(shared, strategy, callbacks=[looks], max_steps=4)
    trainer.fit(module, loader())
    after = {p.device.type for p in module.parameters()}
    trainer.save_checkpoint(path)
    resumed = Looks()
    trainer = trainer_of(shared, staged(shared, staleness=1), callbacks=[resumed], max_steps=6)
    again = Wide()
    trainer.fit(again, loader(), ckpt_path=path)
    return vars(looks), vars(resumed), after, on_host(weights(again)), len(trainer.optimizers[0].state)


def holds_its_part(found, path):
    sizes = {0: 4, 1: 2}  # stage: matrices of 16 MiB
    for rank, (looks, resumed, after, own, states) in enumerate(found):
        stage = 1 - rank
        for seen in (looks, resumed):
            assert seen["before"] == ["cpu"]
            assert seen["module_device"] == "cuda"
            on_gpu = {name for name, device in seen["devices"].items() if device == "cuda"}
            assert on_gpu == {name for name in seen["devices"] if name.startswith(f"net.{stage}.")}
            assert seen["states"] == {"cuda"}
            # weights, gradients, two of Adam's states, and one more while gradients are set aside
            assert seen["peak"] < (5 * sizes[stage] + 3) * 2**24
        assert after == {"cpu"}
        assert states == 2 * (5 if stage == 0 else 3)
        assert different(own, found[0][3]) == []
    saved = torch.load(path, map_location="cpu", weights_only=False)
    assert len(saved["optimizer_states"][0]["state"]) == 16
    assert set(saved["state_dict"]) == set(Wide().state_dict())


def test_a_shared_gpu_holds_of_each_stage_its_part_alone(tmp_path):
    path = str(tmp_path / "x.ckpt")
    holds_its_part(on_gpus(look, True, path, shared=True), path)


def choose(rank, shared):
    strategy = staged(shared, boundaries="auto")
    trainer = trainer_of(shared, strategy, max_steps=4)
    module = Wide()
    trainer.fit(module, loader())
    return strategy.engine.plan.boundaries, on_host(weights(module))


def test_boundaries_are_chosen_by_the_times_of_the_gpu():
    (one, module), (other, twin) = on_gpus(choose, True, shared=True)
    assert one == other
    assert one[0].startswith("net.")
    assert different(module, twin) == []


# ---- several GPUs


@several
@pytest.mark.parametrize("kind", MAKES)
def test_two_gpus_are_one_process(kind):
    same_run(False, MAKES[kind], {}, 1e-6)


@several
def test_two_gpus_in_mixed_precision_are_one_process():
    same_run(False, net, {"precision": "bf16-mixed"}, 1e-6)


@several
def test_each_gpu_holds_its_stages_part_alone(tmp_path):
    path = str(tmp_path / "x.ckpt")
    holds_its_part(on_gpus(look, False, path), path)


@several
def test_two_gpus_learn_with_staleness():
    found = on_gpus(fit_stage, False, net, {"staleness": 2}, {"max_epochs": 10})
    losses = found[0][1]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert different(found[0][0], found[1][0]) == []
