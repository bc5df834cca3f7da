"""Bring to a stage's device what the stage holds, and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dni.core.boundary import named_submodules
from lightning_dni.pipeline.plan import StagePlan, named_tensors, without_wrappers

Bring = Callable[[Tensor], Tensor]
"""Gives a tensor where it is to be."""


def bring_part(model: nn.Module, plan: StagePlan, stage: int, bring: Bring) -> None:
    """Bring the parameters and buffers that `stage` holds, also those that it shares, to where it computes.

    Parameters stay the same objects, so that optimizers find them.

    Args:
        model: The whole model.
        plan: Who owns what.
        stage: Number of the stage.
        bring: Gives a tensor on the stage's device.
    """
    for name, tensor in named_tensors(model).items():
        if isinstance(tensor, nn.Parameter) and plan.holds(stage, name):
            _bring_parameter(tensor, bring)
    _bring_buffers(model, plan, stage, bring)
    for name, module in named_submodules(model).items():
        if isinstance(module, nn.RNNBase) and plan.runs(stage, name):
            module.flatten_parameters()  # cuDNN wants its weights in one piece


def _bring_parameter(parameter: nn.Parameter, bring: Bring) -> None:
    parameter.data = bring(parameter.data)
    if parameter.grad is not None:
        parameter.grad = bring(parameter.grad)


def _bring_buffers(model: nn.Module, plan: StagePlan, stage: int, bring: Bring) -> None:
    brought: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for key, buffer in list(module._buffers.items()):
            name = without_wrappers(f"{prefix}.{key}" if prefix else key)
            if buffer is None or not plan.holds(stage, name):
                continue
            if id(buffer) not in brought:
                brought[id(buffer)] = bring(buffer)
            module._buffers[key] = brought[id(buffer)]


def bring_state(optimizer: Optimizer) -> None:
    """Bring what `optimizer` keeps for a parameter to where the parameter is."""
    for group in optimizer.param_groups:
        # elsewhere the number of steps is read on the CPU
        counts_there = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and (key != "step" or counts_there):
                    state[key] = value.to(parameter.device)


def on_device(device: torch.device) -> Bring:
    """Brings a tensor to `device`."""
    return lambda tensor: tensor.to(device)
