"""Bring what the stages hold together into one whole, as a run in one process would have it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.strategies._compat import move_data_to_device
from lightning_dni.strategies.bucket import broadcast


def share_module(module: nn.Module, plan: StagePlan, ranks: Sequence[int]) -> None:
    """Overwrite the parameters and buffers of other stages with what those have.

    Args:
        module: The whole module, on every rank.
        plan: Who owns what.
        ranks: Global rank of each stage.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for stage, rank in enumerate(ranks):
        own = [tensor for name, tensor in tensors.items() if plan.owner(name) == stage]
        broadcast(own, rank, through=torch.device("cpu"))  # a stage has those of others there


def gather(value: Any) -> list[Any] | None:
    """What every process has, on rank 0; None elsewhere."""
    # unpickled, a tensor of an accelerator would be on that one again
    value = move_data_to_device(value, torch.device("cpu"))
    rank, found = dist.get_rank(), [None] * dist.get_world_size()
    dist.gather_object(value, found if rank == 0 else None)
    return found if rank == 0 else None


def join_optimizer_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of an optimizer over the whole module, from each stage's."""
    whole = dict(states[0])
    whole["state"] = {key: value for state in states for key, value in state["state"].items()}
    return whole


def own_optimizer_state(optimizer: Optimizer, own: Iterable[torch.Tensor]) -> None:
    """Drop what `optimizer` keeps for parameters of other stages."""
    mine = set(own)
    for parameter in [p for p in optimizer.state if p not in mine]:
        del optimizer.state[parameter]


def join_engine_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An engine's state as one process has it, from each stage's, the last stage's first.

    What is under way in the pipeline stands beside it, by boundary.
    """
    if "pipeline" not in states[0]:  # no batch has been seen: what was restored, or nothing
        return dict(states[0])
    upwards = list(reversed(states))
    whole = dict(upwards[0])
    for key in ("kinds", "estimators", "streams"):
        whole[key] = {name: value for state in upwards for name, value in state[key].items()}
    for key in ("specs", "optimizers", "schedules"):
        whole[key] = [value for state in upwards for value in state.get(key, ())]
    whole["skipped"] = {n: max(state["skipped"][n] for state in states) for n in whole["skipped"]}
    pending = {name: value for state in upwards for name, value in state["pipeline"]["pending"].items()}
    whole["pipeline"] = {**whole["pipeline"], "pending": pending}
    return whole
