"""The calls of recurrent modules in one training step: chunks, their ends, and what goes on from them.

A chunk is what one loss is differentiated through: it begins where a state comes in that is cut, goes on
where the state of an earlier call of the step comes in with its graph, and ends where no call goes on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from lightning_dni.core.carry import from_rows, same_rows, to_rows
from lightning_dni.core.estimator import Gradient, Record
from lightning_dni.core.stage import AccumulateGrad
from lightning_dni.errors import BoundaryError, StageError

CALL = "lightning_dni.call"
"""Key under which the autograd nodes of a recurrent module's output remember the number of the call."""


@dataclass(eq=False, slots=True)
class Ending:
    """The state at the end of a chunk and what was said of it, until the next chunk has come back.

    Attributes:
        values: Copies of the state's tensors, as they went out.
        batch_dim: Their dimension that counts rows.
        record: What the estimator saw and said; None where the chunk did not count.
        taken: Whether a chunk of this step goes on from it.
        learned: Whether its target has come.
        passed: Whether a chunk has gone on from it that no loss came back through, so that none will come.
        chunk: The chunk, while its step lasts.
    """

    values: list[Tensor]
    batch_dim: int
    record: Record | None = None
    taken: bool = False
    learned: bool = False
    passed: bool = False
    chunk: "Chunk | None" = None

    def rows(self) -> tuple[Tensor, ...]:
        """What an estimator is shown of it, `[batch, ...]` in full precision."""
        return full_rows(self.values, self.batch_dim)

    def forget_step(self) -> None:
        """Belong to an earlier step than the next."""
        self.passed = self.passed or (self.taken and not self.learned)
        self.taken, self.learned, self.chunk = False, False, None

    def state_dict(self) -> dict[str, Any]:
        """The ending in tensors and primitives; it has a record."""
        assert self.record is not None
        said = self.record.gradient
        return {
            "values": self.values,
            "batch_dim": self.batch_dim,
            "context": self.record.context,
            "gradient": None if said is None else list(said),
            "state": self.record.state,
            "passed": self.passed,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "Ending":
        """Rebuild an ending saved by `state_dict` on `device`."""
        here = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(state))
        ending, said = cls(list(here["values"]), here["batch_dim"]), here["gradient"]
        ending.passed = here.get("passed", False)
        ending.record = Record(
            ending.rows(), here["context"], None if said is None else tuple(said), here["state"]
        )
        return ending

    def continues_in(self, entered: Sequence[Tensor]) -> Tensor:
        """Which rows of the state `entered` are those of this one, `[batch]`."""
        return same_rows(self.values, entered, self.batch_dim)


@dataclass(eq=False, slots=True)
class Call:
    """One call of a recurrent module.

    Attributes:
        number: Unique in the whole run.
        left: The state that went out, with its graph.
        ending: The same without it.
        state: That as the module returned it.
        continued: Whether another call of the step goes on from it.
    """

    number: int
    left: list[Tensor]
    ending: Ending
    state: Any
    continued: bool = False


@dataclass(eq=False, slots=True)
class Chunk:
    """Calls between two cuts of the state.

    Attributes:
        truncation: Name of the recurrent module.
        entered: The state that came in, which keeps its gradient; empty at the start of a sequence.
        batch_dim: Its dimension that counts rows.
        before: The end of the chunk before it.
        rows: Which rows go on from there, `[batch]`.
        calls: The calls, in order.
        closed: Whether the loss has come back through it.
        merged: Chunks that have come together with this one; it has their calls from then on.
    """

    truncation: str
    entered: list[Tensor] = field(default_factory=list)
    batch_dim: int = 0
    before: Ending | None = None
    rows: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    closed: bool = False
    merged: list["Chunk"] = field(default_factory=list)

    def merge(self, others: Iterable["Chunk"]) -> None:
        """Go on for `others`, too."""
        found = (chunk for other in others for chunk in (other, *other.merged))
        for chunk in found:
            if chunk is not self and chunk not in self.merged:
                self.merged.append(chunk)

    @property
    def ends(self) -> list[Call]:
        """The calls from which none goes on."""
        return [call for call in self.calls if not call.continued]

    def take_arrived(self) -> list[Tensor]:
        """The gradient that has come back to the state that came in, in units of the user's loss."""
        grads = [tensor.grad for tensor in self.entered]
        for tensor in self.entered:
            tensor.grad = None
        return [
            t.new_zeros(t.shape) if g is None else g.detach()
            for t, g in zip(self.entered, grads, strict=True)
        ]


def sum_arrived(chunks: Sequence[Chunk]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What has come back to the state with which all of `chunks` begin, `[batch, ...]`, and in which rows."""
    first, *others = [(full_rows(c.take_arrived(), c.batch_dim), c.rows) for c in chunks]
    total, anywhere = first
    for arrived, rows in others:
        assert anywhere is not None
        assert rows is not None
        # where a chunk has begun anew, what has come back to its beginning is none of this
        total = tuple(_in_rows(a, anywhere) + _in_rows(b, rows) for a, b in zip(total, arrived, strict=True))
        anywhere = anywhere | rows
    return total, anywhere


def _in_rows(gradient: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0)


def full_rows(tensors: Iterable[Tensor], batch_dim: int) -> tuple[Tensor, ...]:
    """State tensors or their gradients as `[batch, ...]` in at least float32."""
    rows = [to_rows(t.detach(), batch_dim) for t in tensors]
    return tuple(r.to(torch.promote_types(r.dtype, torch.float32)) for r in rows)


def mark(tensors: Iterable[Tensor], number: int) -> None:
    """Have the nodes that made `tensors` remember the call."""
    for tensor in tensors:
        if tensor.grad_fn is not None:
            cast(dict[str, Any], tensor.grad_fn.metadata)[CALL] = number


def with_own_nodes(output: Any) -> Any:
    """What a module returns, with copies of the tensors that were there before this call.

    The module has handed them on as they came: their nodes cannot stand for this call.
    """
    flat, structure = pytree.tree_flatten(output)
    foreign = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad and _is_foreign(x)]
    if not foreign:
        return output
    for place in foreign:
        flat[place] = flat[place].clone()
    return pytree.tree_unflatten(flat, structure)


def _is_foreign(tensor: Tensor) -> bool:
    return tensor.grad_fn is None or CALL in cast(dict[str, Any], tensor.grad_fn.metadata)


def walk(tensors: Iterable[Tensor], through: bool) -> Iterator[int | None]:
    """The calls in the graph of `tensors`, by number, and None for every parameter.

    Args:
        tensors: Where to begin.
        through: Whether to look behind a call, too.
    """
    begin = list(tensors)
    yield from (None for t in begin if t.requires_grad and t.grad_fn is None)
    stack: list[Node] = [t.grad_fn for t in begin if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        number = cast(dict[str, Any], node.metadata).get(CALL)
        if number is not None:
            yield number
        elif type(node) is AccumulateGrad:
            yield None
        if number is None or through:
            below = [n for n, _ in node.next_functions if n is not None and n not in seen]
            seen.update(below)
            stack += below


def refuse_above(
    boundary: str,
    output: Any,
    same: Iterable[str],
    running: Iterable[str],
    calls: Mapping[int, tuple[Chunk, Call]],
) -> None:
    """Refuse a boundary whose stage a chunk is part of: it is closed before the chunk's end is known.

    Args:
        boundary: Its name.
        output: What it returns.
        same: The truncations that are this module, too.
        running: The truncations whose module is running.
        calls: The calls of this step by number.

    Raises:
        BoundaryError: `boundary` lies in a recurrent module or above it.
    """
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    numbers = (n for n in walk(tensors, through=False) if n is not None)
    below = [calls[n][0].truncation for n in numbers if n in calls]
    found = next(iter([*same, *running, *below]), None)
    if found is not None:
        raise BoundaryError(
            f"Expected boundary {boundary!r} to lie below truncation {found!r}, but got it in or above the "
            "recurrent module: a stage that is closed in the forward pass would never hear of the gradient "
            "at the end of its chunk. Choose boundaries in what leads up to it."
        )


class _WithGradients(torch.autograd.Function):
    """The loss, whose backward pass also begins at states, with gradients that are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *states: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [state.dtype for state in states]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> Any:
        given = [(g * arrived).to(d) for g, d in zip(ctx.gradients, ctx.dtypes, strict=True)]
        return arrived, None, *given


def with_gradients(loss: Tensor, gradients: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """`loss`, as if it had the sum of `gradients` times `states` as a further term that is zero.

    Args:
        loss: A scalar.
        gradients: Derivative of that term with respect to each state; it is scaled as the loss is.
        states: Tensors with a graph.

    >>> state = torch.ones(2, requires_grad=True)
    >>> with_gradients(3 * state.sum(), [torch.tensor([1.0, 5.0])], [state]).backward()
    >>> state.grad
    tensor([4., 8.])
    """
    if not states:
        return loss
    joined: Tensor = _WithGradients.apply(loss, gradients, *states)  # type: ignore[no-untyped-call]
    return joined


def refuse_other_backward(chunks: Iterable[Chunk]) -> None:
    """Refuse a loss that was differentiated without the engine's knowledge.

    Raises:
        StageError: Something came back to the beginning of a chunk that nobody has closed.
    """
    for chunk in chunks:
        if not chunk.closed and any(tensor.grad is not None for tensor in chunk.entered):
            raise StageError(
                "Expected every loss to be differentiated by `manual_backward` (or `engine.backward`), but "
                f"got another way through truncation {chunk.truncation!r}, which had no synthetic gradient. "
                "Call `self.manual_backward(loss)` instead of `loss.backward()`."
            )


def as_applied(gradient: Gradient, left: Sequence[Tensor], batch_dim: int, factor: Any) -> list[Tensor]:
    """The synthetic gradient for each state tensor, times `factor`."""
    return [from_rows(g * factor, state, batch_dim) for g, state in zip(gradient, left, strict=True)]
