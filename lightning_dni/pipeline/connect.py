"""Make the ways between all stages, and close them."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_dni.errors import StageError
from lightning_dni.pipeline.channel import FAREWELL, ReceiveChannel, SendChannel
from lightning_dni.pipeline.guard import Guard, Unguarded
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.wire import Wire


class _Way(NamedTuple):
    """One direction of one boundary in one copy of the pipeline."""

    what: str
    source: int
    target: int
    ranks: tuple[int, int]


def connect(
    ranks: Sequence[Sequence[int]],
    *,
    window: int = 4,
    device: torch.device | None = None,
    timeout: timedelta | None = None,
    with_output: bool = False,
    guard: Guard | None = None,
) -> Links:
    """Connect this process with the stages beside its own; every process of the default group calls it.

    Args:
        ranks: Global rank of each stage of each copy of the pipeline, as `ranks[stage][copy]`.
        window: Messages that may be under way at either end of each way.
        device: Where tensors of an accelerator are put.
        timeout: For making the groups.
        with_output: Whether the network's output goes down too.
        guard: Who knows about the other stages.

    Returns:
        The ends that belong to this process.

    Raises:
        StageError: This process has no place in `ranks`, or another stage has stopped.
    """
    me = dist.get_rank()
    if sum(rank == me for copies in ranks for rank in copies) != 1:
        raise StageError(
            f"ranks: expected rank {me} once, got {[list(c) for c in ranks]}. Give each rank one stage."
        )
    guard = guard or Unguarded()
    make = partial(_wires, _ways(ranks, with_output), me, device or torch.device("cpu"), timeout)
    ends: dict[str, SendChannel | ReceiveChannel] = {}
    for way, wire in guard.call(make):
        other = f"stage {way.target if way.ranks[0] == me else way.source} (rank {wire.peer})"
        if way.ranks[0] == me:
            ends[f"{way.what}_out"] = SendChannel(wire, f"{way.what}s to {other}", window, guard)
        else:
            ends[f"{way.what}_in"] = ReceiveChannel(wire, f"{way.what}s from {other}", window, guard)
    return Links(**ends)  # type: ignore[arg-type]


def close(links: Links, failed: bool = False, seconds: float = FAREWELL) -> None:
    """Close all ends of this process; what is under way still arrives.

    Args:
        links: What `connect` has returned; may be closed already.
        failed: Whether this stage stops because of an error.
        seconds: How long to wait for the other ends.
    """
    for end in links:
        if isinstance(end, SendChannel):
            end.end(failed)  # nobody waits for another one's goodbye before saying it
    for end in links:
        if isinstance(end, (SendChannel, ReceiveChannel)):
            end.close(failed, seconds)


def _ways(ranks: Sequence[Sequence[int]], with_output: bool) -> list[_Way]:
    """All ways, in the one order in which every process makes their groups."""
    ways: list[_Way] = []
    for copy in range(len(ranks[0])):
        for low in range(len(ranks) - 1):
            below, above = ranks[low][copy], ranks[low + 1][copy]
            ways.append(_Way("activation", low, low + 1, (below, above)))
            ways.append(_Way("gradient", low + 1, low, (above, below)))
            if with_output:
                ways.append(_Way("output", low + 1, low, (above, below)))
    return ways


def _wires(
    ways: Sequence[_Way], me: int, device: torch.device, timeout: timedelta | None
) -> list[tuple[_Way, Wire]]:
    """The wires of this process; the groups of all."""
    direct = device.type == "cuda" and "nccl" in dist.get_backend_config()
    wires: list[tuple[_Way, Wire]] = []
    for way in ways:
        # a group of its own per direction: on NCCL both would wait for each other in one queue
        control = dist.new_group(list(way.ranks), timeout, backend="gloo")
        data = dist.new_group(list(way.ranks), timeout, backend="nccl") if direct else None
        if me in way.ranks:
            peer = way.ranks[1] if me == way.ranks[0] else way.ranks[0]
            wires.append((way, Wire(peer, control, data, device)))
    return wires
