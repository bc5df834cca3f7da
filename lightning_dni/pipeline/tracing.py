"""Run the user's step once and see which stage uses what."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import named_submodules, resolve_boundaries, resolve_output
from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.bypass import Frames, Sightings, check_room, version_of
from lightning_dni.pipeline.calls import Calls, plain_call
from lightning_dni.pipeline.keeping import undisturbed
from lightning_dni.pipeline.plan import Crossing, StagePlan, TracedCall, named_tensors, without_wrappers

METADATA = frozenset(
    {
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "is_contiguous",
        "is_complex",
        "is_floating_point",
        "get_device",
        "data_ptr",
        "type",
        "__len__",
        "__repr__",
        "__set__",
    }
)
"""Functions that say something about a tensor but do not use its values."""


def trace_stages(
    model: nn.Module,
    boundaries: Sequence[str],
    run: Callable[[], Any],
    *,
    grad: bool = True,
    output: str | None = None,
    skips: bool = False,
) -> StagePlan:
    """See which stage of `model` uses what, by one call of `run`.

    Random numbers and buffers are afterwards as before. What else the user's code changes stays changed:
    give a copy where that matters. It does not run in inference mode, in which no tensor knows whether it
    was changed in place.

    Args:
        model: The model that `run` calls.
        boundaries: Submodule names or patterns, in any order.
        run: Calls the model as a training step does.
        grad: Whether gradients are to cross.
        output: Submodule whose output is the network's; None: the model's own forward.
        skips: Whether what takes a gradient may travel past a boundary, too.

    Raises:
        BoundaryError: A boundary does not run, runs twice, is unknown, nothing that can be
            differentiated crosses it, or more goes past it than a message takes.
        StageError: Two stages use one tensor.
    """
    names = list(resolve_boundaries(model, boundaries))
    trace = _Trace(model, names, grad)
    seen: list[Any] = []
    output_module = resolve_output(model, output)
    watched = trace.watch(lambda m, out: seen.append(out) if m is output_module else None)
    with torch.inference_mode(False), undisturbed(model), watched, torch.set_grad_enabled(grad):
        trace.end(run())
    trace.check_order()
    bypasses = trace.sightings.bypasses(skips)
    for number, name in enumerate(trace.order):
        check_room(name, len(trace.crossing[name].leaves), [b for b in bypasses if b.rides(number)])
    return StagePlan(
        boundaries=tuple(trace.order),
        tensors=trace.owners(),
        shared=trace.shared(),
        modules=trace.stages_of_modules(),
        calls={name: tuple(trace.calls[m]) for name, m in trace.modules.items() if m in trace.calls},
        crossing=trace.crossing,
        bypasses=bypasses,
        elements_per_row=_elements_per_row(seen),
    )


def _elements_per_row(seen: Sequence[Any]) -> int | None:
    tensors = [x for x in pytree.tree_leaves(seen) if isinstance(x, Tensor) and x.ndim > 0 and len(x) > 0]
    return tensors[0].numel() // len(tensors[0]) if tensors else None


def rows_of(args: Any) -> int | None:
    """Rows of the first tensor that has any dimension."""
    return next((len(x) for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.ndim > 0), None)


class _Uses(TorchFunctionMode):
    """Tells of every tensor whose values a function is given."""

    def __init__(self, on_use: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._on_use = on_use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in METADATA and (name != "__get__" or isinstance(out, Tensor)):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self._on_use(leaf)
        return out


class _Trace:
    """What has been seen of one run."""

    def __init__(self, model: nn.Module, boundaries: Sequence[str], grad: bool) -> None:
        self.model, self.boundaries, self.grad = model, boundaries, grad
        self.modules = named_submodules(model)
        self.order: list[str] = []
        self.crossing: dict[str, Crossing] = {}
        self.calls: dict[nn.Module, list[TracedCall]] = {}
        self._uses: dict[str, set[int]] = {}
        self._names: dict[int, list[str]] = {}
        self.tensors = named_tensors(model)
        for name, tensor in self.tensors.items():
            self._names.setdefault(id(tensor), []).append(name)
        self.sightings, self._frames = Sightings(), Frames()
        self._constant: set[str] = set()

    @contextmanager
    def watch(self, on_output: Callable[[nn.Module, Any], None]) -> Iterator[None]:
        """Watch every call and every use of a parameter or buffer inside the block."""
        calls = Calls()
        before = self._contents()
        names = {id(self.modules[b]): b for b in self.boundaries}
        try:
            for module, name in self._first_names().items():
                calls.place(module, partial(self._call, module, name, names.get(id(module)), on_output))
            with _Uses(self._use):
                yield
        finally:
            calls.remove()
            self._constant = self._unchanged(before)

    def _contents(self) -> dict[str, tuple[Tensor, int, Tensor]]:
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {without_wrappers(n): (b, version_of(b), b.detach().clone()) for n, b in buffers}

    def _unchanged(self, before: dict[str, tuple[Tensor, int, Tensor]]) -> set[str]:
        # batch norm changes its buffers without counting it, others may write what was there
        return {
            name
            for name, (buffer, version, content) in self._contents().items()
            if name in before
            and before[name][0] is buffer
            and before[name][1] == version
            and torch.equal(before[name][2], content)
        }

    def _first_names(self) -> dict[nn.Module, str]:
        first: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            first.setdefault(module, name)
        return first

    def end(self, value: Any) -> None:
        """Note what the step has returned."""
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.sightings.read(leaf, len(self.order))

    def _use(self, tensor: Tensor) -> None:
        self.sightings.read(tensor, len(self.order))
        self._use_own(tensor)

    def _use_own(self, tensor: Any) -> None:
        for name in self._names.get(id(tensor), ()):
            self._uses.setdefault(name, set()).add(len(self.order))

    def _call(
        self,
        module: nn.Module,
        name: str,
        boundary: str | None,
        on_output: Callable[[nn.Module, Any], None],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        entry = len(self.order)
        path = self._frames.enter(name)
        try:
            output = plain_call(module)(*args, **kwargs)
        finally:
            self._frames.leave()
        try:
            facts = Crossing.of(name, output)
        except BoundaryError:
            if boundary is not None:
                raise
            facts = None
        call = TracedCall(entry, len(self.order), rows_of((args, kwargs)), facts)
        self.calls.setdefault(module, []).append(call)
        for leaf in pytree.tree_leaves(output):
            self._use_own(leaf)  # a parameter or buffer itself may be read elsewhere
        on_output(module, output)
        self.sightings.returned(path, call.exit, (args, kwargs), output)
        if boundary is not None and facts is not None:
            self.sightings.crossed(len(self.order), facts.pack(output))
            self._pass(boundary, facts)
        return output

    def _pass(self, boundary: str, facts: Crossing) -> None:
        if boundary in self.order:
            raise BoundaryError(
                f"Expected every boundary to run once in a forward pass of the pipeline, but got a "
                f"second run of {boundary!r}. Choose a module that runs once, or wrap what repeats in one."
            )
        if not facts.leaves:
            raise BoundaryError(
                f"Expected tensors to cross boundary {boundary!r}, but got an output without any. "
                "Choose a module that returns its activation."
            )
        if self.grad and not any(leaf.requires_grad for leaf in facts.leaves):
            raise BoundaryError(
                f"Expected a differentiable tensor to cross boundary {boundary!r}, but got none that "
                "requires a gradient. Unfreeze something below it, or choose a later boundary."
            )
        self.order.append(boundary)
        self.crossing[boundary] = facts

    def check_order(self) -> None:
        """See that every boundary ran.

        Raises:
            BoundaryError: One did not.
        """
        missing = [name for name in self.boundaries if name not in self.order]
        if missing:
            raise BoundaryError(
                f"Expected every boundary to run in the traced step, but {missing} did not; these ran, in "
                f"this order: {self.order}. Choose modules that the step calls as modules, in every step."
            )

    def shared(self) -> frozenset[str]:
        """Buffers that nothing changed and that the code of several stages may read."""
        modules = self.stages_of_modules()
        return frozenset(
            name
            for name in self._constant
            if len(self._uses.get(name, ())) > 1 or len(modules.get(name.rpartition(".")[0], ())) > 1
        )

    def owners(self) -> dict[str, int]:
        """The stage that owns each parameter and buffer.

        Raises:
            StageError: Two stages use one.
        """
        for tensor_names in self._names.values():
            stages = sorted({s for name in tensor_names for s in self._uses.get(name, ())})
            if len(stages) > 1 and not self._constant.issuperset(tensor_names):
                raise StageError(
                    f"Expected every parameter and buffer to be used in one stage, but "
                    f"{' and '.join(map(repr, tensor_names))} is used in stages {stages} of "
                    f"boundaries {self.order} (tied weights). Choose boundaries so that all its uses lie "
                    "in one stage, or give each stage its own."
                )
        called = self.stages_of_calls()
        owners = {i: self._owner(names[0], called) for i, names in self._names.items()}
        return {name: owners[id(tensor)] for name, tensor in self.tensors.items()}

    def _owner(self, name: str, called: dict[str, frozenset[int]]) -> int:
        if name in self._uses:
            return min(self._uses[name])
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            stages = called.get(parent)
            if stages is not None:
                return next(iter(stages)) if len(stages) == 1 else len(self.boundaries)
        return len(self.boundaries)

    def stages_of_calls(self) -> dict[str, frozenset[int]]:
        """The stages that each module that ran has passed through."""
        return {
            name: frozenset(s for c in self.calls[m] for s in range(c.entry, c.exit + 1))
            for name, m in self.modules.items()
            if m in self.calls
        }

    def stages_of_modules(self) -> dict[str, frozenset[int]]:
        """The same for every module; one that was not called runs where its parts and its tensors do."""
        stages = self.stages_of_calls()
        owners = self.owners()
        for name in reversed(self.modules):
            if name not in stages:
                inside = f"{name}." if name else ""
                parts = [s for n, s in stages.items() if n.startswith(inside)]
                held = [frozenset({s}) for n, s in owners.items() if n.startswith(inside)]
                stages[name] = frozenset().union(*parts, *held)
        return {name: stages[name] for name in self.modules}
