"""Measure the forward pass of a model, module by module, and see where it can be cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import device_of, named_submodules
from lightning_dni.core.value import open_value
from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.balance import Candidate, Measured
from lightning_dni.pipeline.calls import Calls, plain_call
from lightning_dni.pipeline.keeping import undisturbed

REPEATS = 5
"""Forward passes that are measured, after one to warm up; the quickest time of each part counts."""


def measure(model: nn.Module, run: Callable[[], Any]) -> Measured:
    """Run a model a few times, and find the modules that run once and past which nothing else goes.

    What is said to be a candidate may still turn out not to be one: the trace of a split knows.

    Args:
        model: The model; random numbers and buffers are afterwards as before, what else the user's code
            changes is not.
        run: Calls it as a training step does; returns the loss, or a dict with the entry "loss".

    Raises:
        BoundaryError: The run returns nothing that can be differentiated.
    """
    timelines: list[_Timeline] = []
    for _ in range(REPEATS + 1):
        timelines[:-1] = [t.without_graph() for t in timelines[:-1]]
        timeline = _Timeline(model)
        with undisturbed(model), torch.enable_grad():
            timeline.follow(run)
        timelines.append(timeline)
    last = timelines[-1]
    alike = [t.pieces for t in timelines[1:] if t.events == last.events]
    ends = list(accumulate(min(times) for times in zip(*alike, strict=True)))
    graph = _Graph(last.result)
    candidates = [
        Candidate(cut.name, ends[cut.event], cut.parameters)
        for cut in last.cuts()
        if graph.is_clean(cut.nodes, cut.newest)
    ]
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    return Measured(tuple(candidates), ends[-1], sum(trainable.values()))


@dataclass(frozen=True)
class _Cut:
    """The output of one call: the nodes of the graph that made it, and the newest one then."""

    name: str
    event: int
    parameters: int
    nodes: frozenset[Any]
    newest: int


class _Timeline:
    """When each call of one run began and ended.

    Attributes:
        events: Names of the modules; a call has two entries.
        pieces: Seconds before each event, and after the last one; what is noted here does not count.
        result: What the run returned.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._device = model, device_of(model)
        self.events: list[str] = []
        self.pieces: list[float] = []
        self.result: Any = None
        self._since = 0.0
        self._runs: dict[str, int] = {}
        self._found: list[_Cut] = []
        self._counted: dict[int, int] = {}

    def follow(self, run: Callable[[], Any]) -> None:
        """Run once and take note."""
        calls, first = Calls(), dict[nn.Module, str]()
        for name, module in named_submodules(self._model).items():
            first.setdefault(module, name)
        try:
            for module, name in first.items():
                calls.place(module, partial(self._call, module, name))
            self._since = self._now()
            self.result = run()
            self._stop()
        finally:
            calls.remove()

    def without_graph(self) -> "_Timeline":
        """Forget all but the times."""
        self.result, self._found = None, []
        return self

    def cuts(self) -> list[_Cut]:
        """The outputs of the modules that ran once; of those that return the same thing, the outermost."""
        once = [cut for cut in self._found if self._runs[cut.name] == 1]
        inner = {
            below.name
            for below, cut in pairwise(once)
            if cut.event == below.event + 1 and cut.nodes == below.nodes
        }
        return [cut for cut in once if cut.name not in inner]

    def _call(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        self._stop(name)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                self._counted[id(parameter)] = parameter.numel()
        self._since = self._now()
        output = plain_call(module)(*args, **kwargs)
        self._stop(name)
        self._runs[name] = self._runs.get(name, 0) + 1
        if name:
            self._note(name, output)
        self._since = self._now()
        return output

    def _note(self, name: str, output: Any) -> None:
        try:
            flat, _ = open_value(name, output)
        except BoundaryError:
            return
        nodes = frozenset(x.grad_fn for x in flat if isinstance(x, Tensor) and x.grad_fn is not None)
        if nodes:
            parameters = sum(self._counted.values())
            self._found.append(_Cut(name, len(self.events) - 1, parameters, nodes, _newest()))

    def _stop(self, name: str | None = None) -> None:
        self.pieces.append(self._now() - self._since)
        if name is not None:
            self.events.append(name)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()


def _newest() -> int:
    """A number that no node of a graph has which is made later."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    return _number(node)


def _number(node: Any) -> int:
    return int(node._sequence_nr())


class _Graph:
    """How the loss came about.

    Args:
        result: What the user's step returned.

    Raises:
        BoundaryError: Nothing in it can be differentiated.
    """

    def __init__(self, result: Any) -> None:
        loss = result["loss"] if isinstance(result, Mapping) and "loss" in result else result
        self._roots = [
            x.grad_fn for x in pytree.tree_leaves(loss) if isinstance(x, Tensor) and x.grad_fn is not None
        ]
        if not self._roots:
            raise BoundaryError(
                "Expected the step to return a loss that can be differentiated where boundaries='auto' are "
                f"chosen, but got {type(result).__name__}. Return the loss, or name the boundaries."
            )
        self._edges: dict[Any, list[Any]] = {}
        self._follow()

    def _follow(self) -> None:
        ahead: list[Any] = list(self._roots)
        while ahead:
            node = ahead.pop()
            if node not in self._edges:
                below = [n for n, _ in node.next_functions if n is not None]
                self._edges[node] = [] if _is_leaf(node) else below
                ahead += self._edges[node]

    def is_clean(self, nodes: frozenset[Any], newest: int) -> bool:
        """Whether all that was made after the node `newest` comes from `nodes`, and no weight is used twice."""
        if nodes.isdisjoint(self._edges) or any(_number(root) <= newest for root in self._roots):
            return False
        leaves: dict[bool, set[Any]] = {True: set(), False: set()}
        for node, below in self._edges.items():
            if _is_leaf(node):
                continue
            above = _number(node) > newest
            leaves[above].update(n for n in below if _is_leaf(n))
            if above and any(not _is_leaf(n) and _number(n) <= newest and n not in nodes for n in below):
                return False
        return leaves[True].isdisjoint(leaves[False])


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"
