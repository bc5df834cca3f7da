"""What the tests of one stage share."""

import torch
from pipeline.families import CLASSES, Net, block, classify, vectors
from torch import nn

from lightning_dni.pipeline.splitting import StageRunner
from lightning_dni.pipeline.tracing import trace_stages

__all__ = ["CLASSES", "Net", "block", "classify", "nn", "run_stage", "traced", "vectors"]


def traced(model, boundaries, step=classify, batch=None, **options):
    """A plan for `model`, and its step without arguments."""
    batch = vectors() if batch is None else batch
    return trace_stages(model, boundaries, lambda: step(model, batch), **options), lambda: step(model, batch)


def received(plan, stage, rows=6):
    """Random values of what crosses into `stage`."""
    crossing = plan.crossing[plan.boundaries[stage - 1]]
    drawn = [
        torch.rand((rows, *leaf.shape[1:])).to(leaf.dtype).requires_grad_(leaf.requires_grad)
        for leaf in crossing.leaves
    ]
    return crossing.unpack(drawn)


def run_stage(model, plan, stage, step):
    """Run one stage on random activations; what the step returned, and what the stage gave."""
    given = []
    with StageRunner(model, plan, stage) as runner:
        value = runner.run(
            step,
            (lambda: received(plan, stage)) if stage else None,
            given.append if stage < plan.stages - 1 else None,
        )
    return value, given
