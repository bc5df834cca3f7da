"""A stage is what autograd says it is: the graph from one cut down to the cuts and leaves below it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lightning_dni.errors import BoundaryError, StageError

Owner = TypeVar("Owner")

_LEAF = torch.empty(0, requires_grad=True)
AccumulateGrad = type(get_gradient_edge(_LEAF).node)
_ToCopy = type(_LEAF.to(torch.float64).grad_fn)

_ONE_GRAPH = (
    " torch.compile made one graph of that stage and of something else that goes up from there, be it a "
    "penalty on weights: compile submodules of the model instead of all of it."
)

CLOSED_BY = "lightning_dni.closed_by"
"""Key under which an autograd node of a stage remembers the boundary that closed it."""


@dataclass
class Stage(Generic[Owner]):
    """The part of a forward pass between its outputs and the cuts below.

    Attributes:
        variables: Leaf tensors that the stage differentiates: parameters, mostly.
        parents: What owns the boundary tensors the stage consumed, each once, oldest first.
    """

    variables: list[Tensor]
    parents: list[Owner]


def trace_stage(
    outputs: Iterable[Tensor],
    owner_of: Callable[[Tensor], Owner | None],
    reached_from: str | None = None,
    closed_by: str | None = None,
) -> Stage[Owner]:
    """Walk the autograd graph from `outputs` down to its leaves.

    The walk is the proof that nothing leaks: a node that an earlier cut has closed must not be
    reached again, whatever way leads to it. Paths that go straight to a parameter (weight
    penalties, tied weights) meet no such node.

    Args:
        outputs: Tensors with a graph.
        owner_of: Says which cut a boundary tensor belongs to, None for any other leaf.
        reached_from: Who walks, named when it meets a closed stage; None to look without checking.
        closed_by: Name of the boundary that closes this stage, None where nothing does.

    Raises:
        BoundaryError: A path reaches into a stage that was closed before.
        StageError: A re-entrant checkpoint hides its parameters from the graph.
    """
    variables: list[Tensor] = []
    parents: list[Owner] = []
    seen: set[Node] = {h.grad_fn or get_gradient_edge(h).node for h in outputs}
    stack: list[Node] = list(seen)
    while stack:
        node = stack.pop()
        if type(node) is AccumulateGrad:
            leaf: Tensor = cast(Any, node).variable
            owner = owner_of(leaf)
            if owner is None:
                variables.append(leaf)
            elif owner not in parents:
                parents.append(owner)
            continue
        if reached_from is not None and not (type(node) is _ToCopy and _casts_leaf(node, owner_of)):
            _check(node, reached_from, closed_by)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    return Stage(variables, parents)


def _casts_leaf(node: Node, owner_of: Callable[[Tensor], Owner | None]) -> bool:
    """Whether a cast is of a parameter: autocast hands one such node to every stage that uses it."""
    ((below, _),) = node.next_functions
    return type(below) is AccumulateGrad and owner_of(cast(Any, below).variable) is None


def _check(node: Node, reached_from: str, closed_by: str | None) -> None:
    metadata = cast(dict[str, str], node.metadata)  # a property, whatever torch's stub says
    if CLOSED_BY in metadata:
        raise BoundaryError(_leak(node, metadata[CLOSED_BY], reached_from))
    if closed_by is not None:
        metadata[CLOSED_BY] = closed_by
    if type(node).__name__ == "CheckpointFunctionBackward":
        raise StageError(
            f"Expected activation checkpointing with use_reentrant=False below {reached_from}, but got "
            "the re-entrant kind, which hides the stage's parameters. Pass use_reentrant=False to "
            "torch.utils.checkpoint.checkpoint."
        )


def _leak(node: Node, closed_by: str, reached_from: str) -> str:
    parent = closed_by.rpartition(".")[0]
    inside = f"{parent!r}, if the path stays inside it" if parent else "a module that contains it"
    return (
        f"A path leaks around boundary {closed_by!r}: {reached_from} reaches {node.name()} inside the "
        f"stage that {closed_by!r} has closed (a skip connection past the boundary, an auxiliary head, "
        f"an activation penalty, or a graph kept from an earlier step). Choose as boundary {inside}, "
        f"or a later module that the path ends before; or use the output of {closed_by!r} instead of "
        "what lies below it." + (_ONE_GRAPH if type(node).__name__ == "CompiledFunctionBackward" else "")
    )


def without_autocast(device: str) -> AbstractContextManager[None]:
    """A block apart from the autocast around it, if there is one."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def local_gradients(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    variables: Sequence[Tensor],
    retain_graph: bool = False,
    only: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Differentiate `outputs` into `variables` without touching what their `.grad` holds.

    It is a plain backward pass into emptied `.grad` fields, not `torch.autograd.grad`: autograd then
    decides as ever what may be stolen and what must be copied, runs the users' hooks, and
    accepts sparse gradients. It runs apart from the autocast of a forward pass around it, which would cast
    what the graph itself did not.

    Args:
        outputs: Tensors with a graph.
        gradients: Derivative of the loss with respect to each output; None for a scalar.
        variables: Every leaf that the graph reaches, but for boundary tensors.
        retain_graph: Keep the graph for another pass.
        only: Whether nobody needs the gradients of other leaves, such as boundary tensors.

    Returns:
        Pairs of variable and gradient, without the variables that got none.
    """
    kept = [v.grad for v in variables]
    for v in variables:
        v.grad = None
    try:
        inputs = list(variables) if only and variables else None
        with without_autocast(outputs[0].device.type):
            torch.autograd.backward(outputs, gradients, retain_graph=retain_graph, inputs=inputs)
        return [(v, v.grad) for v in variables if v.grad is not None]
    finally:
        for v, grad in zip(variables, kept, strict=True):
            v.grad = grad


def accumulate(gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add each gradient to its variable's `.grad`."""
    for variable, gradient in gradients:
        variable.grad = add(variable.grad, gradient)


def add(total: Tensor | None, gradient: Tensor) -> Tensor:
    """`total`, in place where that can be, and `gradient`."""
    if total is None:
        return gradient
    return gradient + total if total.is_sparse and not gradient.is_sparse else total.add_(gradient)


@contextmanager
def in_place_errors(boundaries: Collection[str]) -> Iterator[None]:
    """Say which of the `boundaries` that have run may not be changed in place, where autograd says only why.

    Raises:
        BoundaryError: In place of autograd's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad" in str(error) and boundaries:
            raise BoundaryError(
                f"Expected the output of a boundary in {sorted(boundaries)} not to be changed in "
                "place by what follows it, but got an in-place operation on it. Choose as boundary "
                "the module that makes the change (an inplace=True activation, say), or make it out "
                "of place."
            ) from error
        raise
