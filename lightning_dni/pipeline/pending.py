"""A crossing of which something is still to come: its target gradient, or the network's output."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Installed, Record, Signal
from lightning_dni.core.stage import Stage
from lightning_dni.pipeline.message import Kind, Message


@dataclass(eq=False, slots=True)
class Pending:
    """A crossing of which something is still to come.

    Attributes:
        cut: The crossing.
        step: The stage's number of the forward pass.
        update: The stage's number of updates before it.
        share: What part of an update this forward pass is.
        gradient: What came back from above, once it is here.
        output: The network's output for the same rows, once it is here.
        value: What the estimator predicts, where the one below asks for that.
    """

    cut: Cut
    step: int
    update: int
    share: float
    gradient: Message | None = None
    output: Message | None = None
    value: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all has come that the estimator learns from."""
        hears_output = Signal.OUTPUT in self.cut.installed.estimator.needs
        return self.gradient is not None and not (hears_output and self.output is None)


def take_gradient(cut: Cut, message: Message) -> None:
    """Take over what the stage above has sent back: gradients, and what else the estimator is told there."""
    cut.delivered = True
    gradients, told = _divided(cut, message)
    cut.note_arrived(gradients)
    if told:
        cut.above, cut.output = told
    elif Signal.ESTIMATOR_ABOVE in cut.installed.estimator.needs:
        cut.record = None  # the estimator above was not asked in this batch: there is nothing to learn from


def _divided(cut: Cut, message: Message) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    return message.tensors[: len(cut.leaves)], message.tensors[len(cut.leaves) :]


def gradient_of(crossing: Pending) -> tuple[Tensor | None, ...]:
    """What came back for `crossing`, which has come."""
    assert crossing.gradient is not None
    return _divided(crossing.cut, crossing.gradient)[0]


def save(crossings: Iterable[Pending]) -> list[dict[str, Any]]:
    """Crossings of a drained stage, in tensors and primitives."""
    return [_save(crossing) for crossing in crossings]


def _save(crossing: Pending) -> dict[str, Any]:
    cut, gradient, output = crossing.cut, crossing.gradient, crossing.output
    return {
        "step": crossing.step,
        "update": crossing.update,
        "share": crossing.share,
        "factor": cut.factor,
        "bp_lambda": cut.bp_lambda,
        "leaves": list(cut.leaves),
        "context": None if cut.record is None else cut.record.context,
        "learns": cut.record is not None,
        "state": None if cut.record is None else pytree.tree_map(_without_graph, cut.record.state),
        "gradient": None if gradient is None else list(gradient.tensors),
        "facts": [] if gradient is None else list(gradient.facts),
        "output": None if output is None else output.tensors[0],
    }


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def load(
    boundary: str, installed: Installed, saved: Sequence[Mapping[str, Any]], device: torch.device
) -> list[Pending]:
    """Crossings as they were saved, on `device`, at a boundary whose estimator is `installed`."""
    there: Any = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, list(saved))
    return [_load(boundary, installed, state) for state in there]


def _load(boundary: str, installed: Installed, state: Mapping[str, Any]) -> Pending:
    cut = Cut(
        boundary=boundary,
        installed=installed,
        outputs=[],
        leaves=list(state["leaves"]),
        stage=Stage([], []),
        factor=state["factor"],
        bp_lambda=state["bp_lambda"],
        waits=False,
        elements_unknown=False,
        closed=True,
    )
    if state["learns"]:
        h = tuple(leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in cut.leaves)
        cut.record = Record(h, state["context"], None, state["state"])
    crossing = Pending(cut, state["step"], state["update"], state["share"])
    if state["gradient"] is not None:
        crossing.gradient = Message(
            state["step"], Kind.TRAIN, tuple(state["gradient"]), facts=tuple(state["facts"])
        )
        take_gradient(cut, crossing.gradient)
    if state["output"] is not None:
        crossing.output = Message(state["step"], Kind.TRAIN, (state["output"],))
    return crossing
