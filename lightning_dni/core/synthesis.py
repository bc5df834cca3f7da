"""Ask an estimator, in its own precision and random stream, and check what it says."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Feedback, Gradient, Installed, Record
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.stage import local_gradients
from lightning_dni.core.target import other_elements, sg_loss, sg_loss_gradient
from lightning_dni.errors import EstimatorError


def synthesize(cut: Cut, context: Tensor | None, settings: StepSettings) -> Record:
    """Have the estimator give its gradient for what `cut` passes on.

    Raises:
        EstimatorError: The gradient has the wrong shape.
    """
    installed = cut.installed
    h = tuple(leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in cut.leaves)
    estimator = installed.estimator
    learns = bool(installed.parameters) and not settings.keep_lessons
    with estimating(installed, h[0], grad=learns and estimator.keeps_graph and not installed.explicit):
        gradient, state = estimator.synthesize(h, context, None)
    if gradient is not None:
        check_shapes(gradient, h, cut.who)
        if cut.elements_unknown:
            check_zero(gradient, cut.who)
    if gradient is not None or not estimator.locks:
        cut.said = observed(h if gradient is None else gradient)
    return Record(h, context, gradient, state)


def recount(cuts: Iterable[Cut], settings: StepSettings, before: int | None, elements: int) -> None:
    """Take into the cuts' `factor` how many elements per row the network's output has turned out to have.

    Args:
        cuts: Those of the step.
        settings: What holds for the step.
        before: The number that was taken to be that, if there was one.
        elements: What it is.

    Raises:
        EstimatorError: A stage was given a gradient already that the other number has divided.
    """
    for cut in (cut for cut in cuts if not cut.elements_seen):
        cut.elements_seen = True
        if cut.divided and before not in (None, elements):
            raise other_elements(cut.who, before, elements)
        if cut.leaves:
            cut.factor = settings.factor(cut.leaves, None, elements)


def value_of(cut: Cut, record: Record) -> Tensor | None:
    """What the estimator of `cut` predicts, for the one at the boundary below.

    It is a copy: the estimator's weights, of which it may be a view, have moved when the other one learns.

    Raises:
        EstimatorError: It is no tensor.
    """
    with estimating(cut.installed, record.h[0], grad=False):
        value = cut.installed.estimator.value(record)
        if value is not None and not isinstance(value, Tensor):
            raise EstimatorError(
                f"Expected `value` of {cut.who} to give a tensor or None, but got {type(value).__name__}. "
                "Stack what the estimator below learns from into one tensor."
            )
        return None if value is None else value.detach().clone()


def synthesize_below(cut: Cut, context: Tensor | None) -> None:
    """Have the estimator say, too, what the stage below is given at its own output.

    Raises:
        EstimatorError: The gradient has the wrong shape.
    """
    h = tuple(h.detach().to(torch.promote_types(h.dtype, torch.float32)) for h in cut.outputs)
    with estimating(cut.installed, h[0], grad=False):
        below, _ = cut.installed.estimator.synthesize(h, context, None)
    if below is not None:
        check_shapes(below, h, cut.who)
        cut.below = tuple(g.detach() for g in below)
        cut.said = observed(below) if cut.said is None else cut.said + observed(below)


def correct(cut: Cut, record: Record, feedback: Feedback) -> None:
    """Let an estimator that was told first say something else.

    Raises:
        EstimatorError: The gradient has the wrong shape.
    """
    if cut.installed.estimator.relays and feedback.target is None:  # nobody looks at it in these units
        cut.said = None if cut.arrived is None else observed(cut.arrived)
        return
    with estimating(cut.installed, record.h[0], grad=False):
        corrected = cut.installed.estimator.correct(record, feedback)
    if corrected is not None:
        check_shapes(corrected, record.h, cut.who)
        cut.synthetic, cut.said = corrected, observed(corrected)


def learn(installed: Installed, record: Record, feedback: Feedback, share: float) -> Tensor | None:
    """The estimator's loss, times the `share` of this forward pass in the user's step."""
    with estimating(installed, record.h[0], grad=True):
        loss = installed.estimator.loss(record, feedback)
        return loss if loss is None or share == 1.0 else loss * share


def differentiate_loss(
    cut: Cut, feedback: Feedback, share: float, settings: StepSettings
) -> list[tuple[Tensor, Tensor]] | None:
    """Gradients of the estimator's parameters, with its loss left on `cut`; None if it learns nothing."""
    installed, record = cut.installed, cut.record
    assert record is not None
    if installed.explicit and record.gradient is not None:
        return _differentiate_sg_loss(cut, record, record.gradient, feedback, share, settings.report)
    loss = learn(installed, record, feedback, share)
    if loss is None:
        return None
    check_graph(loss, installed, cut.who)
    cut.learnt = loss.detach()
    cut.loss = cut.learnt / share if settings.report else None
    return local_gradients([loss], None, installed.parameters)


def _differentiate_sg_loss(
    cut: Cut, record: Record, said: Gradient, feedback: Feedback, share: float, report: bool
) -> list[tuple[Tensor, Tensor]]:
    """The same for an estimator that needs no autograd, from what arrived or from the target made of it."""
    arrived, unit = feedback.target, 1.0
    if cut.learns_from_arrived:
        arrived, unit = tuple(cut.arrived or ()), 1.0 / float(cut.factor)
    assert arrived is not None
    with estimating(cut.installed, record.h[0], grad=False):
        difference, factor = sg_loss_gradient(said, arrived, unit)
        made = cut.installed.estimator.parameter_gradients(record, tuple(difference), factor * share)
    found = [(variable, gradient) for variable, gradient in made if variable.requires_grad]
    # where a gradient has the fewest elements, most of the differences went into each
    cut.learnt = observed([min((g for _, g in found), key=Tensor.numel)] if found else difference)
    cut.loss = sg_loss(said, feedback.target) if report and feedback.target is not None else None
    return found


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


def check_graph(loss: Tensor, installed: Installed, who: str) -> None:
    """Refuse a loss from which nothing can be learnt.

    Raises:
        EstimatorError: Naming `who` made it.
    """
    if not loss.requires_grad and any(p.requires_grad for p in installed.parameters):
        raise EstimatorError(
            f"Expected the loss of {who} to depend on its parameters, but got one without a graph. Where "
            "`record.gradient` carries none (`record.gradient[0].requires_grad` is False), call `synthesize` "
            "again in `loss`."
        )


def check_shapes(gradient: Gradient, h: Sequence[Tensor], who: str) -> None:
    """Refuse a gradient that does not fit `h`.

    Raises:
        EstimatorError: Naming `who` gave it.
    """
    if len(gradient) != len(h) or any(g.shape != t.shape for g, t in zip(gradient, h, strict=True)):
        expected, got = [tuple(t.shape) for t in h], [tuple(t.shape) for t in gradient]
        raise EstimatorError(
            f"Expected {who} to give one gradient per activation, of shapes {expected}, but got {got}."
        )


def observed(gradient: Sequence[Tensor]) -> Tensor:
    """A scalar that is finite if all of `gradient` is (its sum: one pass, nothing made on the way)."""
    sums = [g.detach().sum(dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradient]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def check_zero(gradient: Gradient, who: str) -> None:
    """Refuse a gradient other than zero while nobody knows what the user's loss is divided by.

    Raises:
        EstimatorError: Naming `who` gave it.
    """
    if any(bool(g.any()) for g in gradient):
        raise EstimatorError(
            f"Expected the network's output to be seen before {who} gives anything but zero, because "
            "loss_denominator='elements' counts its elements, but got none so far. Pass `output=` the name "
            "of the submodule that gives it, or a callable `loss_denominator`."
        )
