"""The upper boundary of a stage: the graph below, what is sent on, and what will come back for it."""

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dni.core.context import check_context
from lightning_dni.core.cut import Cut, lambda_at
from lightning_dni.core.estimator import Feedback, Installed, Record, Signal, rows_of
from lightning_dni.core.probe import Truth, differentiate_again, donated_buffer_errors
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.stage import Stage, local_gradients, trace_stage
from lightning_dni.core.synthesis import correct, differentiate_loss, estimating, synthesize
from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.pending import Pending

Received = Sequence[Tensor]
"""The leaves that a stage got from the one below."""


def open_cut(
    boundary: str,
    outputs: list[Tensor],
    received: Received,
    own: Container[int],
    install: Callable[[str, Sequence[Tensor]], Installed],
    settings: StepSettings,
    value: Any,
) -> Cut:
    """Cut `outputs` off what follows: find the stage below, ask for its estimator.

    Args:
        boundary: Name of the boundary.
        outputs: Its tensors that carry a gradient.
        received: The leaves from the stage below.
        own: Ids of the parameters that this stage holds.
        install: Gives the estimator.
        settings: What holds for the step.
        value: The boundary's whole output.

    Raises:
        BoundaryError: The graph reaches a parameter of another stage.
    """
    below = {id(leaf) for leaf in received}
    found: Stage[Cut] = trace_stage(outputs, lambda _: None, f"boundary {boundary!r}", boundary)
    variables = [v for v in found.variables if id(v) not in below]
    refuse_foreign(variables, own, f"the stage below boundary {boundary!r}")
    installed = install(boundary, outputs)
    bp_lambda = lambda_at(boundary, installed, settings.bp_lambda[boundary])
    return Cut(
        boundary=boundary,
        installed=installed,
        outputs=outputs,
        leaves=[h.detach() for h in outputs],
        stage=Stage(variables, []),
        factor=settings.factor(outputs, value, settings.elements_per_row),
        bp_lambda=bp_lambda,
        waits=bp_lambda > 0 or bool(installed.estimator.locks),
        elements_unknown=settings.counts_elements and settings.elements_per_row is None,
    )


def refuse_foreign(variables: Iterable[Tensor], own: Container[int], where: str) -> None:
    """Refuse to differentiate a parameter that another stage holds.

    Raises:
        BoundaryError: There is one.
    """
    foreign = [tuple(v.shape) for v in variables if isinstance(v, nn.Parameter) and id(v) not in own]
    if foreign:
        raise BoundaryError(
            f"Expected {where} to use its own parameters only, but got {len(foreign)} of other stages, of "
            f"shapes {foreign[:3]}. Use a parameter in one stage, or move the boundary."
        )


def ask(cut: Cut, settings: StepSettings, keeps_graph: bool) -> Record:
    """Have the estimator of `cut` give its gradient; what it saw and said.

    Args:
        cut: The crossing.
        settings: What holds for the step.
        keeps_graph: Whether its target comes in this step, and not with a lag.

    Raises:
        EstimatorError: The context that it asks for is not there or does not fit, or its gradient does not.
    """
    estimator = cut.installed.estimator
    context = check_context(
        settings.context,
        estimator.num_classes,
        estimator.context_size,
        estimator.ignore_index,
        rows_of(cut.leaves),
        cut.who,
        settings.check_values,
    )
    if not keeps_graph and context is not None:
        context = context.clone()  # a later batch may be written over it before the target is here
    record = synthesize(cut, context, settings if keeps_graph else replace(settings, keep_lessons=True))
    if record.gradient is not None:
        cut.synthetic = tuple(g.detach() for g in record.gradient)
    if cut.installed.parameters or cut.waits:
        cut.record = record
    return record


def learn(pending: Pending, settings: StepSettings, age: int) -> None:
    """Take the gradients of the estimator's loss, with its weights as they are now.

    Args:
        pending: The crossing, to which all has come that the estimator asked for.
        settings: What holds for the step.
        age: Number of the stage's updates since the synthesis.
    """
    cut, record = pending.cut, pending.cut.record
    if record is None or not cut.installed.parameters:
        return
    if age and cut.installed.explicit:  # what it said then is not what it says now
        with estimating(cut.installed, record.h[0], grad=False):
            said, _ = cut.installed.estimator.synthesize(record.h, record.context, None)
        record = cut.record = record._replace(gradient=said)
    feedback = _feedback(pending, age)
    made = differentiate_loss(cut, feedback, pending.share, settings)
    if made is not None:
        cut.estimator_grads = made
        if settings.keep_lessons:
            cut.lesson = (cut.installed, record, feedback, pending.share)


def _feedback(pending: Pending, age: int) -> Feedback:
    cut, needs = pending.cut, pending.cut.installed.estimator.needs
    if cut.delivered and Signal.TARGET in needs:
        cut.target = cut.target_gradient()
    output, gradient = cut.output, None
    if pending.output is not None and needs & {Signal.OUTPUT, Signal.OUTPUT_GRADIENT}:
        output, gradient = (*pending.output.tensors, None)[:2]
    if gradient is not None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / cut.factor
    return Feedback(target=cut.target, output=output, output_gradient=gradient, above=cut.above, age=age)


def differentiate(cut: Cut, received: Received, keep_graph: bool = False) -> None:
    """Differentiate the stage below `cut` against what is applied there; leaves keep what comes back.

    Args:
        cut: The crossing.
        received: The leaves from the stage below.
        keep_graph: Whether it is differentiated once more, as `differentiate_truly` does.
    """
    cut.closed = True
    gradients = cut.applied_gradient()
    if gradients is not None:
        with donated_buffer_errors(cut.boundary) if keep_graph else nullcontext():
            found = local_gradients(*cut.reached(gradients), [*cut.stage.variables, *received], keep_graph)
        below = {id(leaf): leaf for leaf in received}
        for variable, gradient in found:
            if id(variable) in below:
                variable.grad = gradient
            else:
                cut.param_grads.append((variable, gradient))
    if not keep_graph:
        cut.outputs = []


def differentiate_truly(
    cut: Cut, true: Sequence[Tensor | None], received: Received
) -> tuple[Truth, tuple[Tensor | None, ...]]:
    """Differentiate the kept graph below `cut` against the true gradient there.

    Args:
        cut: The crossing.
        true: The true gradient of each of its tensors; None for exactly zero.
        received: The leaves from the stage below.

    Returns:
        The true gradients here, and those of `received`.
    """
    variables = cut.stage.variables
    if all(g is None for g in true):
        return Truth(None, []), (None,) * len(received)
    gradient = [h.new_zeros(h.shape) if g is None else g for g, h in zip(true, cut.outputs, strict=True)]
    found = differentiate_again(cut, gradient, [*variables, *received])
    weights = [(v, g) for v, g in zip(variables, found, strict=False) if g is not None]
    return Truth(gradient, weights), tuple(found[len(variables) :])


def say_again(pending: Pending) -> None:
    """Let an estimator that was told first say something else."""
    if pending.cut.record is not None:
        correct(pending.cut, pending.cut.record, _feedback(pending, 0))


def gradients_at(received: Received) -> tuple[Tensor | None, ...]:
    """Take what a backward pass has left at the leaves."""
    found = tuple(leaf.grad for leaf in received)
    for leaf in received:
        leaf.grad = None
    return found
