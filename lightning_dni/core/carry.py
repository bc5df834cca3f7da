"""The state that a recurrent module hands on, in rows that an estimator can see and that can be compared."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import COMPILED, choose_by_patterns, resolve_submodules
from lightning_dni.core.value import close_value, differentiable, open_value
from lightning_dni.errors import BoundaryError, EstimatorError

Truncations = Sequence[str] | Mapping[str, int]
"""Names or patterns of recurrent submodules; or {pattern: batch dimension of the state}."""
_UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def resolve_truncations(model: nn.Module, truncations: Truncations | None) -> dict[str, int | None]:
    """The recurrent submodules of `model` by name, with the batch dimension of their state if it was said.

    Raises:
        BoundaryError: A pattern matches nothing, or a module's state cannot be handed on.
    """
    if not truncations:
        return {}
    found = resolve_submodules(model, truncations, "truncations")
    for name, module in found.items():
        outer = [other for other in found if name.startswith(f"{other}.")]
        if outer:
            raise BoundaryError(
                f"Expected no truncation inside another, but got {name!r} in {outer[0]!r}: the gradient of "
                "one future would be added twice. Name the outer or the inner one."
            )
        if getattr(core_of(module), "bidirectional", False):
            raise BoundaryError(
                f"Expected a recurrent module that reads forward at truncation {name!r}, but got a "
                "bidirectional one, which needs the whole sequence. Pass bidirectional=False."
            )
    said = truncations if isinstance(truncations, Mapping) else {}
    by_name: dict[str, int | None] = dict.fromkeys(found)
    for pattern, dim in said.items():
        by_name |= dict.fromkeys(resolve_submodules(model, [pattern], "truncations"), dim)
    return by_name


def refuse_beside_truncations(
    bp_lambda: Any, update_probability: Any, update: str, synthetic_inputs: Any
) -> None:
    """Refuse options of an engine that do not go with truncations.

    Raises:
        EstimatorError: Something asks for gradients that nobody has, or for stages.
    """
    for argument, value, default in (
        ("bp_lambda", bp_lambda, 0.0),
        ("update_probability", update_probability, 1.0),
        ("update", update, "step"),
        ("synthetic_inputs", synthetic_inputs, None),
    ):
        if value != default:
            raise EstimatorError(
                f"Expected no `{argument}` with `truncations`, but got {value!r}: the true gradient of the "
                "future is never there, and the end of a chunk is only known with the loss. Leave it out."
            )


def refuse_without_truncations(damping: Any, sequence_end: str) -> None:
    """Refuse options that have an effect at truncations alone.

    Raises:
        EstimatorError: One is given.
    """
    given = {"damping": damping} if damping != 1.0 else {}
    if sequence_end == "ignore":
        given["sequence_end"] = sequence_end
    for argument, value in given.items():
        raise EstimatorError(
            f"Expected `truncations` beside `{argument}`, but got {value!r} alone: it has an effect at the "
            "ends of chunks alone. Leave it out, or name recurrent modules in `truncations`."
        )


def choose_damping(names: Iterable[str], value: float | Mapping[str, float]) -> dict[str, float]:
    """What synthetic gradients are multiplied by, by truncation.

    Raises:
        EstimatorError: A value is outside (0, 1].
        BoundaryError: No pattern matches a truncation, or a pattern matches none.
    """
    chosen = choose_by_patterns(names, value, "damping")
    for damping in chosen.values():
        if not isinstance(damping, (int, float)) or not 0.0 < damping <= 1.0:
            raise EstimatorError(f"Expected `damping` to be above 0 and up to 1, but got {damping!r}.")
    return {name: float(damping) for name, damping in chosen.items()}


def core_of(module: nn.Module) -> nn.Module:
    """The module without torch.compile's wrapper."""
    core: nn.Module = getattr(module, COMPILED, module)
    return core


def state_argument(module: nn.Module) -> str | None:
    """Name of the second argument of a module, which is its state; None where it has no name of its own."""
    arguments = list(inspect.signature(core_of(module).forward).parameters.values())
    named = len(arguments) > 1 and not any(a.kind in _UNNAMED for a in arguments[:2])
    return arguments[1].name if named else None


def returned_state(name: str, module: nn.Module, output: Any) -> Any:
    """The state in what a module returns: all of it for torch's cells, else its second half.

    Raises:
        BoundaryError: There are not two halves.
    """
    if isinstance(core_of(module), nn.RNNCellBase):
        return output
    if not isinstance(output, tuple) or len(output) != 2:
        got = f"{len(output)} values" if isinstance(output, tuple) else type(output).__name__
        raise BoundaryError(
            f"Expected truncation {name!r} to return (output, state), but got {got} from "
            f"{type(core_of(module)).__name__}. Choose a module that is called as module(input, state) and "
            "returns both, as nn.LSTM does."
        )
    return output[1]


class StateValue:
    """A state opened into its floating-point tensors, which may be replaced.

    Args:
        name: The truncation, for messages.
        state: A tensor, or a tuple, list or dict of tensors.

    Attributes:
        tensors: The floating-point tensors in it; those of a dict by key.

    Raises:
        BoundaryError: It cannot be opened, or holds complex tensors with a gradient.
    """

    def __init__(self, name: str, state: Any) -> None:
        self._flat, self._structure = open_value(name, state)
        differentiable(self._flat, name)
        self._places = [
            i for i in _in_order(state) if isinstance(x := self._flat[i], Tensor) and x.is_floating_point()
        ]
        self.tensors: list[Tensor] = [self._flat[i] for i in self._places]

    def replaced(self, tensors: Sequence[Tensor]) -> Any:
        """The same structure with other tensors in it."""
        flat = list(self._flat)
        for place, tensor in zip(self._places, tensors, strict=True):
            flat[place] = tensor
        return close_value(flat, self._structure)


def _in_order(state: Any, first: int = 0) -> list[int]:
    """Places of the leaves from `first` on, those of a dict by key: it may come back with its keys turned.

    >>> _in_order({"slow": 1.0, "fast": (2.0, torch.Size([3]))})
    [1, 2, 0]
    """
    leaves = pytree.tree_leaves(state)
    opens = isinstance(state, (tuple, list, Mapping)) and not any(leaf is state for leaf in leaves)
    if not opens:
        return list(range(first, first + len(leaves)))
    named = isinstance(state, Mapping)
    parts = []
    for key, part in state.items() if named else enumerate(state):
        parts.append((repr(key) if named else "", _in_order(part, first)))
        first += len(parts[-1][1])
    return [place for _, places in sorted(parts, key=itemgetter(0)) for place in places]


def refuse_numbers(name: str, state: Any) -> None:
    """Refuse whole numbers where the state of truncation `name` should be, such as the lengths of sequences.

    Raises:
        BoundaryError: `state` is nothing but such.
    """
    leaves = pytree.tree_leaves(state) if isinstance(state, (Tensor, list, tuple)) else []
    kinds = {str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves}
    if kinds and "NoneType" not in kinds:
        raise BoundaryError(
            f"Expected truncation {name!r} to be called as module(input, state), but got {sorted(kinds)} as "
            "its second argument, which no gradient comes back to. Pass the state there, None at first, and "
            "what else the module needs beside its input, as in module((input, lengths), state)."
        )


def find_batch_dim(name: str, module: nn.Module, state: Sequence[Tensor], said: int | None) -> int:
    """The dimension of every tensor of `state` that counts rows.

    It is what the user has `said`; 1 for nn.LSTM, nn.GRU and nn.RNN, be they batch_first or not; and 0 where
    all tensors are `[batch, features]`.

    Raises:
        BoundaryError: It cannot be told, or the tensors do not agree on it.
    """
    shapes = [tuple(tensor.shape) for tensor in state]
    stacked = isinstance(core_of(module), nn.RNNBase)
    dim = said if said is not None else int(stacked)
    if said is None and any(len(shape) != 2 + stacked for shape in shapes):
        raise BoundaryError(
            f"Expected a state of truncation {name!r} whose batch dimension is known ([layers, batch, "
            f"features] of nn.LSTM, nn.GRU and nn.RNN, [batch, features] of others), but got {shapes}. Pass "
            f"truncations={{{name!r}: 0}}, or whichever dimension counts sequences; unbatched input needs a "
            "batch dimension of 1."
        )
    if any(len(shape) <= dim for shape in shapes) or len({shape[dim] for shape in shapes}) > 1:
        raise BoundaryError(
            f"Expected all tensors in the state of truncation {name!r} to have the same number of rows in "
            f"dimension {dim}, but got shapes {shapes}. Pass truncations={{{name!r}: k}}, where dimension k "
            "counts sequences."
        )
    return dim


def to_rows(tensor: Tensor, batch_dim: int) -> Tensor:
    """A state tensor as `[batch, ...]`; where the batch does not come first, the rest is one row of features.

    >>> to_rows(torch.zeros(2, 3, 5), 1).shape
    torch.Size([3, 10])
    """
    rows = tensor.movedim(batch_dim, 0)
    return rows.flatten(1) if batch_dim else rows


def from_rows(rows: Tensor, like: Tensor, batch_dim: int) -> Tensor:
    """Undo `to_rows` for a tensor of the shape of `like`."""
    return rows.reshape(like.movedim(batch_dim, 0).shape).movedim(0, batch_dim)


def same_rows(left: Sequence[Tensor], entered: Sequence[Tensor], batch_dim: int) -> Bool[Tensor, " batch"]:
    """Which rows of a state come in as they went out, to the bit.

    >>> same_rows([torch.ones(3, 2)], [torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])], 0)
    tensor([ True, False, False])
    """
    pairs = zip(left, entered, strict=True)
    equal = [to_rows(out.to(back) == back, batch_dim).flatten(1).all(1) for out, back in pairs]
    return equal[0] if len(equal) == 1 else torch.stack(equal).all(0)


def keep_rows(state: Any, rows: Tensor | None) -> Any:
    """An estimator's state `[batch, ...]` for sequences that go on in these `rows`; it is zero in others."""
    if rows is None or state is None:
        return None
    return pytree.tree_map(
        lambda s: (
            torch.where(rows.view(-1, *[1] * (s.ndim - 1)), s, s.new_zeros(()))
            if isinstance(s, Tensor)
            else s
        ),
        state,
    )
