"""Tensors without values for what lies below a stage: shapes to compute with, never numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.shapes import Memo, recipe_of, signature_of
from lightning_dni.pipeline.tracing import METADATA

PLACES: dict[str, Callable[[torch.device], Any]] = {
    "device": lambda device: device,
    "is_meta": lambda device: False,
    "is_cpu": lambda device: device.type == "cpu",
    "is_cuda": lambda device: device.type == "cuda",
}
"""What a placeholder says about where it is: what the tensor itself would say."""
MOVES = frozenset({"cpu", "cuda"})
MEMO = 1024
"""How many calls between modules are remembered."""
NEEDS_GRAD = frozenset({"register_hook", "retain_grad", "register_post_accumulate_grad_hook"})


class Below:
    """What a stage may do with the values of the stages below: anything until its input has arrived.

    Attributes:
        stage: The stage.
        boundary: Its lower boundary.
        open: Whether the input is still to arrive.
        everything: Whether all tensors are only shapes now, those of the batch and of this stage too.
        refused: The first refusal; it stands also where the user's code catches it.
        foreign: Parameters and buffers of other stages, by their ids; they have no values here.
        device: Where the user's code believes all tensors to be.
    """

    def __init__(self, stage: int, boundary: str) -> None:
        self.stage, self.boundary = stage, boundary
        self.open = self.everything = False
        self.refused: BoundaryError | None = None
        self.foreign: frozenset[int] = frozenset()
        self.device = torch.device("cpu")
        self._memo = Memo(MEMO)

    def concerns(self, tensor: Tensor) -> bool:
        """Whether `tensor` has no values on this stage."""
        return (
            self.everything or isinstance(tensor, Placeholder) or tensor.is_meta or id(tensor) in self.foreign
        )

    @contextmanager
    def shapes_only(self) -> Iterator[None]:
        """Let everything be only shapes in a block, which may fail."""
        self.everything = True
        try:
            yield
        finally:
            self.everything = False

    def refuse(self, what: str, remedy: str) -> BoundaryError:
        """Note and return the error that says `what` the code of this stage did."""
        error = BoundaryError(
            f"Expected stage {self.stage} to need nothing from below boundary {self.boundary!r} but its "
            f"output, but got {what}. {remedy}"
        )
        self.refused = self.refused or error
        return error

    def skip_connection(self, what: str) -> BoundaryError:
        """The refusal of a value that came past the boundary."""
        return self.refuse(
            f"{what} (a skip connection past the boundary)",
            "Move the boundary to where the two have met, such as the end of the residual block, or choose a "
            "module that returns both.",
        )

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` on shapes.

        Raises:
            BoundaryError: The input has arrived, values are needed, or the batch would change.
        """
        if self.everything:
            return self.shapes(func, args, kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and func.__self__.__name__ in PLACES:
            return PLACES[func.__self__.__name__](self.device)
        if not self.open and name not in METADATA and name != "__get__":
            raise self.skip_connection(f"a tensor from below in `{name}`")
        changes = _changes_in_place(name, kwargs)
        if changes:
            self._check_target(name, args, kwargs)
        signature = None if changes or name in NEEDS_GRAD else signature_of(args, kwargs)
        key = None if signature is None else (func, signature)
        recipe = self._memo.get(key)
        if recipe is not None:
            return recipe.make(self.make)
        try:
            out = self.shapes(func, args, kwargs)
            self._memo.put(key, recipe_of(out))
            return out
        except Exception as error:
            raise self.refuse(
                f"code between the modules below it in which `{name}` cannot run without values ({error})",
                "Put that code into a module of its own, or move the boundary.",
            ) from error

    def shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run `func` on shapes only, whatever it needs and changes."""
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = _map(_to_meta, args), _map(_to_meta, kwargs)
            if name in NEEDS_GRAD:
                args = (args[0].detach().requires_grad_(), *args[1:])
            if name in MOVES:
                return self.mark(args[0].clone())
            if name == "to":
                args = tuple("meta" if isinstance(x, str) else x for x in args)
            if "device" in kwargs:
                kwargs["device"] = "meta"
            return self.mark(func(*args, **kwargs))

    def _check_target(self, name: str, args: Any, kwargs: Any) -> None:
        for target in _leaves([*args[:1], kwargs.get("out")]):
            if isinstance(target, Tensor) and not self.concerns(target):
                raise self.refuse(
                    f"a change in place of a tensor of the batch by `{name}`",
                    "Use the form that makes a new tensor, or put that code into a module of its own.",
                )

    def mark(self, value: Any) -> Any:
        """`value` with a placeholder for every tensor in it."""
        with torch._C.DisableTorchFunctionSubclass():
            return _map(self._mark, value)

    def make(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A placeholder of these facts."""
        with torch._C.DisableTorchFunction():
            tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta").as_subclass(Placeholder)
        tensor.below = self
        return tensor

    def _mark(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        placeholder = _to_meta(x).as_subclass(Placeholder)
        placeholder.below = self
        return placeholder


class Placeholder(Tensor):
    """The shape of a tensor that another stage has."""

    below: Below

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Go on with shapes, or refuse."""
        kwargs = kwargs or {}
        below = next(x.below for x in _leaves((args, kwargs)) if isinstance(x, Placeholder))
        return below.compute(func, args, kwargs)


def _to_meta(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("meta")
    if not isinstance(x, Tensor) or (type(x) is Tensor and x.is_meta):
        return x
    if isinstance(x, Placeholder):
        return x.as_subclass(Tensor)
    return x.detach().to("meta")


def _changes_in_place(name: str, kwargs: Any) -> bool:
    if name.endswith("__"):
        return name.startswith("__i") or name in {"__setitem__", "__set__"}
    return name.endswith("_") or kwargs.get("out") is not None


def _leaves(x: Any) -> Iterator[Any]:
    """What is in `x`; as pytree has it, but quick for what most calls are given."""
    kind = type(x)
    if kind is tuple or kind is list:
        for part in x:
            yield from _leaves(part)
    elif kind is dict:
        for part in x.values():
            yield from _leaves(part)
    elif isinstance(x, tuple | list | dict):
        yield from pytree.tree_leaves(x)
    else:
        yield x


def _map(change: Callable[[Any], Any], x: Any) -> Any:
    """`x` with `change` made to all that is in it."""
    kind = type(x)
    if kind is tuple or kind is list:
        return kind(_map(change, part) for part in x)
    if kind is dict:
        return {key: _map(change, part) for key, part in x.items()}
    return change(x) if isinstance(x, Tensor) or x is None else pytree.tree_map(change, x)


class ShapesOnly(TorchFunctionMode):
    """Code below the lower boundary: what depends on other stages' tensors has shapes only."""

    def __init__(self, below: Below) -> None:
        super().__init__()
        self._below = below

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, below = kwargs or {}, self._below
        if below.open and any(isinstance(x, Tensor) and below.concerns(x) for x in _leaves((args, kwargs))):
            return below.compute(func, args, kwargs)
        return func(*args, **kwargs)
