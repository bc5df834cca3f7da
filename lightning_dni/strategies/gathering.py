"""Bring what the stages hold together into one whole, as a run in one process would have it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.strategies.bucket import broadcast

LARGE = 2**16
"""Bytes from which on a tensor is sent by itself."""


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


def collect_module(
    module: nn.Module, plan: StagePlan, stage: int, speaks: bool, device: torch.device
) -> None:
    """Overwrite the parameters and buffers of other stages on rank 0 with what those have.

    Args:
        module: The whole module, on every rank.
        plan: Who owns what.
        stage: That of this process.
        speaks: Whether this process is the one of its stage that is asked.
        device: As in `gather`.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {name: t.detach() for name, t in tensors.items() if speaks and plan.owner(name) == stage}
    for said in gather(own, device) or ():
        for name, value in said.items():
            tensors[name].detach().copy_(value)


def gather(value: Any, device: torch.device) -> list[Any] | None:
    """What every process has, on rank 0, and there on the CPU; None elsewhere.

    Large tensors are sent one by one: in an object, they would be copied several times, by every process.

    Args:
        value: Tensors and primitives, nested.
        device: That of this process, where the backend sends from it.
    """
    via = device if device.type == "cuda" and "nccl" in dist.get_backend_config() else torch.device("cpu")
    rank = dist.get_rank()
    outlines: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(pytree.tree_map(_outline, value), outlines if rank == 0 else None)
    if rank:
        for tensor in filter(_is_large, pytree.tree_leaves(value)):
            dist.send(_bytes(tensor.to(via)), 0)
        return None
    others = [
        pytree.tree_map(partial(_receive, source=source, via=via), outline)
        for source, outline in enumerate(outlines)
        if source
    ]
    return [value, *others]


def _is_large(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.numel() * leaf.element_size() >= LARGE


def _outline(leaf: Any) -> Any:
    """What goes into the object in the place of `leaf`."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().to("meta" if _is_large(leaf) else "cpu")


def _receive(leaf: Any, source: int, via: torch.device) -> Any:
    """The tensor of which an outline has come."""
    if not (isinstance(leaf, torch.Tensor) and leaf.is_meta):
        return leaf
    tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=via)
    dist.recv(_bytes(tensor), source)
    return tensor.cpu()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """What is sent: every backend takes bytes, whatever the dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def join_optimizer_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of an optimizer over the whole module, from each stage's."""
    whole = dict(states[0])
    joined = {key: value for state in states for key, value in state["state"].items()}
    whole["state"] = dict(sorted(joined.items()))
    return whole


def own_optimizer_state(optimizer: Optimizer, own: Iterable[torch.Tensor]) -> None:
    """Drop what `optimizer` keeps for parameters of other stages."""
    mine = set(own)
    for parameter in [p for p in optimizer.state if p not in mine]:
        del optimizer.state[parameter]


def under_way(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage has to say of its own, where the first copy of the pipeline says the rest."""
    return {"pipeline": {"pending": state["pipeline"]["pending"]}}


def join_engine_states(
    states: Sequence[Mapping[str, Any]], others: Sequence[Sequence[Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """An engine's state as one process has it.

    What is under way in the pipeline stands beside it, by boundary.

    Args:
        states: Each stage's, the last stage's first.
        others: What is `under_way` in each further copy of the pipeline.
    """
    upwards = list(reversed(states))
    whole = dict(upwards[0])
    for key in ("kinds", "estimators", "streams"):
        whole[key] = {name: value for state in upwards for name, value in state[key].items()}
    for key in whole.keys() & {"specs", "optimizers", "schedules"}:  # weights alone have no optimizers
        whole[key] = [value for state in upwards for value in state[key]]
    whole["skipped"] = {n: max(state["skipped"][n] for state in states) for n in whole["skipped"]}
    moved = [state["pipeline"] for state in upwards]
    whole["pipeline"] = dict(moved[0])
    for key in whole["pipeline"].keys() & {"pending", "late", "norms"}:
        whole["pipeline"][key] = {name: value for each in moved for name, value in each[key].items()}
    if others:
        whole["pipeline"]["copies"] = [
            {name: value for each in reversed(copy) for name, value in each["pipeline"]["pending"].items()}
            for copy in others
        ]
    return whole
