"""The true gradient, from the forward pass that was trained on: once more down the kept graphs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dni.core.cut import Cut
from lightning_dni.core.hooks import hooks_asleep
from lightning_dni.core.instrument import Instrument, Observation
from lightning_dni.core.stage import without_autocast
from lightning_dni.errors import StageError


class Truth(NamedTuple):
    """True gradients at one crossing, in units of the user's loss; None for exactly zero."""

    gradient: Sequence[Tensor] | None
    weights: Sequence[tuple[Tensor, Tensor]]


def true_gradients(
    cuts: Sequence[Cut],
    top: Sequence[Cut],
    retain_graph: bool = False,
    unspent: Tensor | None = None,
) -> Mapping[Cut, Truth]:
    """Chain vector-Jacobian products through the stages, from the loss down.

    The graphs are those of the training forward pass, so dropout masks, batch statistics and
    weights are the same, and nothing is run or drawn again.

    Args:
        cuts: The cuts that count, topmost first, with their graphs retained.
        top: Those whose gradient came from the loss itself.
        retain_graph: Keep the graphs for instruments.
        unspent: The loss, where the last stage sat the step out and nothing came from it.

    Raises:
        StageError: A stage cannot be differentiated twice.
    """
    true: dict[Cut, list[Tensor] | None] = {cut: true_at_top(cut) if cut in top else None for cut in cuts}
    for swap in (swap for cut in cuts for swap in cut.swaps):
        swap.exact = True
    if unspent is not None:
        true |= _ask_loss(top, unspent)
    weights: dict[Cut, list[tuple[Tensor, Tensor]]] = {cut: [] for cut in cuts}
    for cut in cuts:
        gradient = true[cut]
        if gradient is None:
            continue
        below = [leaf for parent in cut.stage.parents for leaf in parent.leaves]
        variables = cut.stage.variables
        found = iter(differentiate_again(cut, gradient, [*variables, *below], retain_graph))
        weights[cut] = [(v, g) for v, g in zip(variables, found, strict=False) if g is not None]
        for parent in cut.stage.parents:
            true[parent] = [
                leaf.new_zeros(leaf.shape) if g is None else g
                for leaf, g in zip(parent.leaves, found, strict=False)
            ]
    return {cut: Truth(true[cut], weights[cut]) for cut in cuts}


def true_at_top(cut: Cut) -> list[Tensor] | None:
    """What the loss has left there, as if no layer's vector-Jacobian product had been an estimator's."""
    if cut.arrived is None:
        return None
    true = {id(leaf): gradient for leaf, gradient in zip(cut.leaves, cut.arrived, strict=True)}
    for swap in cut.swaps:
        for leaf, missing in zip(swap.leaves, swap.correction, strict=False):
            if missing is not None and id(leaf) in true:
                true[id(leaf)] = true[id(leaf)] + missing
    return list(true.values())


def _ask_loss(top: Sequence[Cut], loss: Tensor) -> dict[Cut, list[Tensor] | None]:
    """What a loss that was not differentiated would leave at the topmost cuts."""
    leaves = [leaf for cut in top for leaf in cut.leaves]
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else [])
    return {
        cut: [
            leaf.new_zeros(leaf.shape) if g is None else g for leaf, g in zip(cut.leaves, found, strict=False)
        ]
        for cut in top
    }


def differentiate_again(
    cut: Cut, gradient: Sequence[Tensor], inputs: Sequence[Tensor], retain_graph: bool = False
) -> Sequence[Tensor | None]:
    """Gradients of `inputs` through the kept graph of the stage below `cut`, given that of its output.

    Raises:
        StageError: The stage cannot be differentiated twice.
    """
    if not inputs:
        return []
    try:
        apart = without_autocast(cut.outputs[0].device.type)
        with apart, hooks_asleep(_hooks_of(cut.stage.variables)):
            return torch.autograd.grad(
                cut.outputs, inputs, gradient, retain_graph=retain_graph, allow_unused=True
            )
    except RuntimeError as error:
        raise StageError(
            f"Expected the stage below boundary {cut.boundary!r} to be differentiable twice on a probe "
            f"step, but got: {error} Train without probes (GradientMonitor(probe=False)), or replace "
            "the operation that frees its own graph."
        ) from error


def run_instruments(
    instruments: Sequence[Instrument], crossings: Sequence[Observation]
) -> dict[Instrument, dict[str, Tensor]]:
    """What each instrument measures at one boundary, detached.

    Args:
        instruments: The instruments.
        crossings: The crossings of the boundary, in forward order.
    """
    with ExitStack() as stack:
        for crossing in crossings:
            stack.enter_context(hooks_asleep(_hooks_of(crossing.variables)))
        stack.enter_context(torch.enable_grad())
        return {each: {k: v.detach() for k, v in each(crossings).items()} for each in instruments}


def observe(
    cut: Cut, truth: Truth, context_for: Callable[[Cut], Tensor | None], scale: float | Tensor
) -> Observation:
    """What instruments are shown of `cut`.

    Args:
        cut: A cut that counts, with its graph retained.
        truth: Its true gradients.
        context_for: Gives the context that an estimator asks for.
        scale: What a gradient scaler has multiplied the loss with.
    """
    return Observation(
        boundary=cut.boundary,
        estimator=cut.installed.estimator,
        h=tuple(h.detach().to(torch.promote_types(h.dtype, torch.float32)) for h in cut.leaves),
        context=context_for(cut),
        outputs=cut.outputs,
        variables=cut.stage.variables,
        applied=cut.applied_gradient() if cut.ran else None,
        true=truth.gradient,
        true_weights=truth.weights,
        scale=scale,
    )


@contextmanager
def donated_buffer_errors(boundary: str) -> Iterator[None]:
    """Say what to do where a compiled graph cannot be kept for a second pass.

    Raises:
        StageError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise StageError(
            f"Expected the stage below boundary {boundary!r} to be differentiable twice on a probe step, but "
            "torch.compile has made a graph that reuses its memory. Set "
            "`torch._functorch.config.donated_buffer = False` before training, or train without probes "
            "(GradientMonitor(probe=False))."
        ) from error


def _hooks_of(variables: Sequence[Tensor]) -> list[dict[int, Any]]:
    """The users' hooks, which would see gradients that are only measured."""
    return [v._backward_hooks for v in variables if v._backward_hooks]
