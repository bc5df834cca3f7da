"""What a callback may have measured on a probe step, while the graphs of the stages are still there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_dni.core.estimator import GradientEstimator


@dataclass(frozen=True)
class Observation:
    """One crossing of a boundary, as an instrument sees it.

    An instrument reads and differentiates, with `retain_graph=True`; it changes nothing, draws from no
    generator but its own, and asks a copy of the estimator, whose buffers and streams are part of the run.

    Gradients are in units of the step's loss, as they come back through the graph.

    Attributes:
        boundary: Name of the boundary.
        estimator: Its estimator.
        h: What it was asked about, one tensor `[batch, ...]` per leaf, in its precision.
        context: The labels or context that it was told; None where it asks for none.
        outputs: The activation with the graph of the stage below, which other instruments need, too.
        variables: The leaf tensors of that stage that take a gradient: its parameters, mostly.
        applied: The gradient that the stage was given; None for exactly zero, and where it sat the step out.
        true: The true gradient; None for exactly zero.
        true_weights: What the stage's variables get from the true gradient.
        scale: What a gradient scaler has multiplied the loss with.
    """

    boundary: str
    estimator: GradientEstimator
    h: tuple[Tensor, ...]
    context: Tensor | None
    outputs: Sequence[Tensor]
    variables: Sequence[Tensor]
    applied: Sequence[Tensor] | None
    true: Sequence[Tensor] | None
    true_weights: Sequence[tuple[Tensor, Tensor]]
    scale: float | Tensor = 1.0


Instrument = Callable[[Sequence[Observation]], Mapping[str, Tensor]]
"""Measures at one boundary, given its crossings in forward order; gives figures by name."""
