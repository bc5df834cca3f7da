"""The layers that read an activation: their vector-Jacobian product may be the estimator's instead."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_dni.core.boundary import named_submodules
from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import GradientEstimator, Signal
from lightning_dni.core.stage import AccumulateGrad

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {kind.forward for kind in _KINDS}

READ_BY = "lightning_dni.read_by"
"""Key under which the autograd node of a layer's output remembers the layer."""


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """The linear layers and convolutions of `model` by name, each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_submodules(model).items():
        if getattr(type(module), "forward", None) in _FORWARDS:
            found.setdefault(id(module), (name, module))
    return {name: cast(Layer, module) for name, module in found.values()}


def input_gradient(layer: Layer, weight: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Vector-Jacobian product of `layer` with respect to its input `x`, as if its weight were `weight`.

    Args:
        layer: Gives stride, padding and so on.
        weight: Of the shape of the layer's own, of the dtype of `gradient`.
        x: The input; only its shape counts.
        gradient: Of the layer's output.
    """
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        with torch.enable_grad():
            again = torch.zeros_like(x, dtype=gradient.dtype, requires_grad=True)
            out = cast(Any, layer)._conv_forward(again, weight, None)
            return torch.autograd.grad(out, again, gradient)[0]
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        gradient.new_empty(1).expand(x.shape),
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0],
        layer.groups,
        (True, False, False),
    )[0]
    return found


@dataclass(eq=False)
class Swap:
    """One call of one layer whose vector-Jacobian product is an estimator's.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        estimator: That of the activation which the layer reads; it gives the product.
        leaves: What is passed on at this and at further crossings that it reads, on probe steps.
        exact: Whether the layer's own product is asked for after all, to measure the true gradient.
        correction: What the true gradient at `leaves` has more than what the backward pass left there.
    """

    name: str
    layer: Layer
    estimator: GradientEstimator
    leaves: list[Tensor] = field(default_factory=list)
    exact: bool = False
    correction: tuple[Tensor | None, ...] = ()

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The product that is asked for."""
        if self.exact:
            return self._own(x, gradient)
        given = self.estimator.pull_back(self.name, self.layer, x, gradient).to(x.dtype)
        if self.leaves:  # while the graph below x is there
            missing = self._own(x, gradient) - given
            self.correction = torch.autograd.grad(
                x, self.leaves, missing, retain_graph=True, allow_unused=True
            )
        return given

    def _own(self, x: Tensor, gradient: Tensor) -> Tensor:
        weight = self.layer.weight.detach().to(gradient.dtype)
        return input_gradient(self.layer, weight, x, gradient).to(x.dtype)


class _Swapped(torch.autograd.Function):
    """Identity on a layer's output; what comes back goes to the layer's weights and, by a swap, to `x`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, swap: Swap) -> Tensor:
        """The output: the same memory, yet no view, so that it may be changed in place."""
        ctx.save_for_backward(x)
        ctx.swap = swap
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """For the layer's own graph as it came, for `x` as the swap says."""
        (x,) = ctx.saved_tensors
        return gradients[0], ctx.swap.pull_back(x, gradients[0]), None


class Reach(NamedTuple):
    """What a tensor was computed from, down to the nearest layers.

    Attributes:
        cuts: Crossings whose activation it comes from.
        layers: Whether it comes from the output of a layer.
        variables: Other leaf tensors, parameters mostly.
    """

    cuts: list[Cut]
    layers: bool
    variables: list[Tensor]


def look_down(tensors: Iterable[Tensor], owner_of: Callable[[Tensor], Cut | None]) -> Reach:
    """Walk down from `tensors` to the nearest outputs of layers and leaf tensors."""
    tensors = list(tensors)
    leaves = [t for t in tensors if t.grad_fn is None]
    stack: list[Node] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen, layers = set(stack), False
    while stack:
        node = stack.pop()
        if READ_BY in cast(Mapping[str, str], node.metadata):
            layers = True
            continue
        if type(node) is AccumulateGrad:
            leaves.append(cast(Any, node).variable)
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    owners = [owner_of(leaf) for leaf in leaves]
    cuts = list(dict.fromkeys(owner for owner in owners if owner is not None))
    return Reach(cuts, layers, [leaf for leaf, owner in zip(leaves, owners, strict=True) if owner is None])


class Consumers:
    """Swaps the layers that read an activation whose estimator asks for its consumer, during one step.

    A layer reads an activation if it is the first on a way up from it; what lies between (an activation
    function, a norm, a reshape) is differentiated as it is.

    Args:
        probe: Whether true gradients are measured in this step.

    Attributes:
        exact: What a gradient passes through unswapped although something below learns from it.
    """

    def __init__(self, probe: bool) -> None:
        self.exact: dict[str, None] = {}
        self._probe = probe
        self._entered: dict[int, tuple[Tensor, Swap]] = {}

    def enter(self, name: str, layer: Layer, x: Tensor, reach: Reach, notes: bool) -> Tensor | None:
        """Give what a layer shall read instead of `x`, None for `x` itself.

        Args:
            name: Name of the layer.
            layer: The layer.
            x: What it is about to read.
            reach: What that was computed from.
            notes: Whether to note in `exact` what is not swapped.
        """
        asking = [cut for cut in reach.cuts if asks_for_consumer(cut)]
        if not asking:
            if notes and (reach.layers or any(isinstance(v, nn.Parameter) for v in reach.variables)):
                self.exact.setdefault(name)
            return None
        for weight in (v for v in reach.variables if notes and v.ndim > 1):
            self.exact.setdefault(f"a weight of shape {tuple(weight.shape)} before {name}")
        leaves = [leaf for cut in reach.cuts for leaf in cut.leaves] if self._probe else []
        swap = Swap(name, layer, asking[-1].installed.estimator, leaves)
        self._entered[id(layer)] = x, swap
        for cut in asking:
            cut.swaps.append(swap)
        return x.detach()

    def leave(self, name: str, layer: Layer, output: Tensor) -> Tensor | None:
        """Connect the output of `layer` with what it did not read; None to pass it on as it is."""
        entered = self._entered.pop(id(layer), None)
        swapped = None if entered is None else cast(Tensor, cast(Any, _Swapped.apply)(output, *entered))
        node = (output if swapped is None else swapped).grad_fn
        if node is not None:
            cast(dict[str, str], node.metadata)[READ_BY] = name
        return swapped

    def end_stage(self, reach: Reach) -> None:
        """Note from which activations a way up to the end of a stage, with this `reach`, meets no layer."""
        for cut in reach.cuts:
            if asks_for_consumer(cut):
                self.exact.setdefault(f"a way from {cut.boundary} that meets no layer")


def asks_for_consumer(cut: Cut) -> bool:
    """Whether the layers that read the activation of `cut` are swapped."""
    return Signal.CONSUMER in cut.installed.estimator.needs


_HYBRID = "hybrid, exact through "


class Hybrid:
    """Through what the gradient passes unswapped in any step, which is told once."""

    def __init__(self) -> None:
        self._exact: list[str] | None = None

    def add(self, exact: Iterable[str]) -> None:
        """Take note of what was found in a step, and warn of what is new."""
        known = self._exact or []
        new = [what for what in exact if what not in known]
        self._exact = known + new
        if new:
            warnings.warn(
                "Expected every linear layer and convolution but the first to read the output of a boundary "
                f"with feedback alignment, but the gradient passes exactly through {new}: this is a hybrid "
                "with backprop. Add the boundaries below them, or compare it as what it is.",
                stacklevel=3,
            )

    def describe(self) -> str:
        """Whether it is feedback alignment proper, and what makes it a hybrid."""
        if self._exact is None:
            return "known after the first step"
        return f"{_HYBRID}{self._exact}" if self._exact else "proper"


def join_alignments(one: str, other: str) -> str:
    """What `Hybrid.describe` says of two parts of a model, as one.

    >>> join_alignments("proper", "hybrid, exact through ['0.2']")
    "hybrid, exact through ['0.2']"
    """
    exact = [
        part
        for said in (one, other)
        if said.startswith(_HYBRID)
        for part in said[len(_HYBRID) :].split(" and ")
    ]
    return _HYBRID + " and ".join(dict.fromkeys(exact)) if exact else other
