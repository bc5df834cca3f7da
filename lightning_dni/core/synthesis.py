"""Ask an estimator, in its own precision and random stream, and check what it says."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Feedback, Gradient, Installed, Record
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.stage import local_gradients
from lightning_dni.core.target import sg_loss, sg_loss_gradient
from lightning_dni.errors import EstimatorError


def synthesize(cut: Cut, context: Tensor | None, settings: StepSettings) -> Record:
    """Have the estimator give its gradient for what `cut` passes on.

    Raises:
        EstimatorError: The gradient has the wrong shape, or is not finite.
    """
    installed = cut.installed
    h = tuple(leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in cut.leaves)
    estimator = installed.estimator
    learns = bool(installed.parameters) and not settings.keep_lessons
    with estimating(installed, h[0], grad=learns and estimator.keeps_graph and not estimator.differentiates):
        gradient, state = estimator.synthesize(h, context, None)
    if gradient is not None:
        # what regresses on its target is looked at there, where that costs less
        later = learns and estimator.regresses
        check_gradient(gradient, h, cut, settings.check_values and not later)
        if cut.elements_unknown:
            _check_zero(gradient, cut)
    return Record(h, context, gradient, state)


def learn(installed: Installed, record: Record, feedback: Feedback, share: float) -> Tensor | None:
    """The estimator's loss, times the `share` of this forward pass in the user's step."""
    with estimating(installed, record.h[0], grad=True):
        loss = installed.estimator.loss(record, feedback)
        return loss if loss is None or share == 1.0 else loss * share


def differentiate_loss(
    cut: Cut, feedback: Feedback, share: float, settings: StepSettings
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None] | None:
    """Gradients of the estimator's parameters, and (on reports) its loss; None if it learns nothing.

    Raises:
        EstimatorError: What the estimator gave is not finite.
    """
    installed, record = cut.installed, cut.record
    assert record is not None
    estimator, said = installed.estimator, record.gradient
    if estimator.differentiates and said is not None:
        return _differentiate_sg_loss(cut, record, said, feedback, share, settings)
    if settings.check_values and estimator.regresses and said is not None:
        check_gradient(said, record.h, cut, check_values=True)
    loss = learn(installed, record, feedback, share)
    if loss is None:
        return None
    found = local_gradients([loss], None, installed.parameters)
    return found, loss.detach() / share if settings.report else None


def _differentiate_sg_loss(
    cut: Cut, record: Record, said: Gradient, feedback: Feedback, share: float, settings: StepSettings
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """The same for an estimator that needs no autograd, from what arrived or from the target made of it."""
    arrived, unit = feedback.target, 1.0
    if cut.learns_from_arrived:
        arrived, unit = tuple(cut.arrived or ()), 1.0 / float(cut.factor)
    assert arrived is not None
    with estimating(cut.installed, record.h[0], grad=False):
        difference, factor = sg_loss_gradient(said, arrived, unit)
        found = cut.installed.estimator.parameter_gradients(record, tuple(difference), factor * share)
    if settings.check_values and found and not _is_finite(min((g for _, g in found), key=Tensor.numel)):
        check_gradient(said, record.h, cut, check_values=True)
    return found, sg_loss(said, feedback.target) if feedback.target is not None else None


def estimating(installed: Installed, h: Tensor, grad: bool) -> AbstractContextManager[object]:
    """Run an estimator in full precision, with or without a graph, in its own stream if it draws."""
    if installed.stream is None and not torch.is_autocast_enabled(h.device.type):  # most often
        return nullcontext() if grad and torch.is_grad_enabled() else torch.set_grad_enabled(grad)
    return _apart(installed, h.device.type, grad)


@contextmanager
def _apart(installed: Installed, device: str, grad: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if installed.stream is not None:
            stack.enter_context(installed.stream)
        yield


def check_gradient(gradient: Gradient, h: Sequence[Tensor], cut: Cut, check_values: bool) -> None:
    """Refuse a gradient that does not fit `h`, or (where `check_values`) is not finite.

    Raises:
        EstimatorError: Naming the estimator of `cut`.
    """
    if len(gradient) != len(h) or any(g.shape != t.shape for g, t in zip(gradient, h, strict=True)):
        expected, got = [tuple(t.shape) for t in h], [tuple(t.shape) for t in gradient]
        raise EstimatorError(
            f"Expected {cut.who} to give one gradient per activation, of shapes {expected}, but got {got}."
        )
    if check_values and not all(map(_is_finite, gradient)):
        raise EstimatorError(
            f"Expected {cut.who} to give finite gradients, but got some that are not. Lower the learning "
            "rate of `estimator_optimizer`, or of the network."
        )


def _is_finite(gradient: Tensor) -> bool:
    # a sum is finite unless a term is not, or unless it overflows: only then look closer
    return math.isfinite(gradient.detach().sum().item()) or bool(gradient.isfinite().all())


def _check_zero(gradient: Gradient, cut: Cut) -> None:
    if any(bool(g.any()) for g in gradient):
        raise EstimatorError(
            f"Expected the network's output to be seen before {cut.who} gives anything but zero, because "
            "loss_denominator='elements' counts its elements, but got none so far. Pass `output=` the name "
            "of the submodule that gives it, or a callable `loss_denominator`."
        )
