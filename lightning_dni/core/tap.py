"""Forward hooks that are installed together, removed together, and dead on copies of the module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_dni.core.boundary import COMPILED, named_submodules, resolve_output
from lightning_dni.core.consumer import Layer
from lightning_dni.errors import BoundaryError, StageError

OnOutput = Callable[[Any], Any]
"""Receives a module's output; returns what to pass on instead, or None for the output itself."""
OnLayer = Callable[[str, Layer, Tensor], Tensor | None]
"""The same for the input or output of the layer of that name."""


def inert(module: nn.Module, args: Any, output: Any = None) -> None:
    """What a tap becomes on a copied or pickled module."""


class Tap:
    """A forward hook that belongs to one module object: copies and pickles of it are inert."""

    def __init__(self, on_output: OnOutput) -> None:
        # torch.compile runs it as it is, between two graphs, whatever the hooked module is part of
        self._on_output: OnOutput = torch.compiler.disable(on_output)  # type: ignore[no-untyped-call]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hand `output` over; its replacement goes on."""
        return self._on_output(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


class InputTap(Tap):
    """The same on what goes into a module, as its first argument."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        """Hand the first argument over; its replacement goes in."""
        given = self._on_output(args[0]) if args and isinstance(args[0], Tensor) else None
        return None if given is None else (given, *args[1:])


class StateTap:
    """Hands over the state with which a recurrent module is called, as `module(input, state)`.

    Args:
        on_state: Receives it; its replacement goes in.
        name: Name of the argument, for who passes it by name; None where it has none: then it is whatever
            is passed second.
    """

    def __init__(self, on_state: OnOutput, name: str | None) -> None:
        self._on_state: OnOutput = torch.compiler.disable(on_state)  # type: ignore[no-untyped-call]
        self._name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the state over, None where there is none."""
        if len(args) > 1:
            return (args[0], self._on_state(args[1]), *args[2:]), kwargs
        second = [*kwargs][1 - len(args) : 2 - len(args)] if self._name is None else [self._name]
        for name in (name for name in second if name in kwargs):
            return args, kwargs | {name: self._on_state(kwargs[name])}
        self._on_state(None)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return inert


def carries_taps(model: nn.Module) -> bool:
    """Whether an engine has hooked `model` or any of its submodules."""
    return any(isinstance(hook, Tap) for m in model.modules() for hook in m._forward_hooks.values())


def drop_compiled(model: nn.Module) -> None:
    """Drop what torch.compile has made so far, if `model` or any submodule of it is compiled.

    It would pass by hooks that it has not seen; it is made again, with them, when it is next run.
    """
    if any(COMPILED in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        torch.compiler.reset()


@contextmanager
def one_graph_errors(boundaries: Sequence[str]) -> Iterator[None]:
    """Say what to do where torch.compile stops at a hook because of fullgraph=True.

    Raises:
        BoundaryError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "Unsupported" or "disable" not in str(error):
            raise
        raise BoundaryError(
            f"Expected boundaries {list(boundaries)} to lie outside what is compiled as one graph, but got "
            "torch.compile(..., fullgraph=True) around one. Compile the boundaries' own modules, or leave "
            "out fullgraph=True."
        ) from error


def saved_as_ever() -> AbstractContextManager[object]:
    """A block whose graphs keep their tensors themselves, whatever a checkpoint does with those around it.

    A checkpoint would look for them when it runs its region again, in which estimators have no part.
    """
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if look is not None and look(False) is None:  # most often: nobody does anything with them
        return nullcontext()
    # detached: what a graph saves of its own output would keep the graph alive
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _itself)


def _itself(x: Tensor) -> Tensor:
    return x


class Taps:
    """The hooks of one engine."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._busy = False
        self.watches_layers = False

    @property
    def installed(self) -> bool:
        """Whether any hook is on a module."""
        return bool(self._handles)

    def attach(
        self,
        model: nn.Module,
        boundaries: Mapping[str, OnOutput],
        output: str | None,
        on_output: OnOutput,
        on_again: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Hook the submodules named in `boundaries`, and the one that gives the network's output.

        Args:
            model: Has them all.
            boundaries: What receives the output of each.
            output: Name of the one that gives the network's output; None for `model` itself.
            on_output: Receives that.
            on_again: Is called with the name of a boundary that a checkpoint runs again meanwhile.

        Raises:
            StageError: The model is hooked already.
            BoundaryError: `output` names no submodule.
        """
        if carries_taps(model):
            whose = "its" if self.installed else "another engine's"
            raise StageError(
                f"Expected a model without hooks of an engine, but {type(model).__name__} already has "
                f"{whose}. Call `detach()` on that engine first."
            )
        modules = named_submodules(model)
        for name, on_boundary in boundaries.items():
            self._install(modules[name], on_boundary, partial(on_again, name))
        self._install(resolve_output(model, output), on_output)
        drop_compiled(model)

    def attach_layers(self, layers: Mapping[str, Layer], enter: OnLayer, leave: OnLayer) -> None:
        """Hook linear layers, so that they may read something else and have something else made of it.

        Args:
            layers: The layers by name.
            enter: Is called with name, layer and what it is about to read.
            leave: Is called with name, layer and its output, before any other hook.
        """
        if self.watches_layers:
            return
        self.watches_layers = True
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_pre_hook(InputTap(partial(enter, name, layer))))
            tap = Tap(partial(leave, name, layer))
            self._handles.append(layer.register_forward_hook(tap, prepend=True))

    def attach_states(self, module: nn.Module, name: str | None, enter: OnOutput, leave: OnOutput) -> None:
        """Hook a recurrent module, so that it may be given another state and that what it returns is seen.

        Args:
            module: The module.
            name: Name of its argument that is the state.
            enter: Receives the state; gives what to read instead.
            leave: Receives what the module returns.
        """
        tap = StateTap(enter, name)
        self._handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))
        self._handles.append(module.register_forward_hook(Tap(leave)))

    def _install(
        self, module: nn.Module, on_output: OnOutput, on_again: Callable[[], None] = lambda: None
    ) -> None:
        self._handles.append(module.register_forward_hook(Tap(partial(self._once, on_output, on_again))))

    def _once(self, on_output: OnOutput, on_again: Callable[[], None], output: Any) -> Any:
        """Cut nothing of what a checkpoint runs again while a callback differentiates its stage."""
        if self._busy:
            on_again()
            return None
        self._busy = True
        try:
            with saved_as_ever():
                return on_output(output)
        finally:
            self._busy = False

    def remove(self) -> None:
        """Take every hook off again; harmless where none is installed."""
        self.watches_layers = False
        while self._handles:
            self._handles.pop().remove()
