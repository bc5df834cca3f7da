"""One decoupled training step: cut on the way up, settle on the way down."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef

from lightning_dni.core.context import check_context
from lightning_dni.core.cut import Cut, lineage
from lightning_dni.core.estimator import Feedback, Installed, Lock, Record, Signal, rows_of
from lightning_dni.core.stage import Stage, accumulate, local_gradients, trace_stage
from lightning_dni.core.target import Denominator, denominator
from lightning_dni.errors import BoundaryError, EstimatorError

Lesson = tuple[Installed, Record, Feedback, float]
"""What an estimator learns from and with what share, kept where it takes several steps on it."""


@dataclass(frozen=True)
class StepSettings:
    """What holds for one whole step.

    Attributes:
        batch: The user's batch, for a callable `loss_denominator`.
        context: What was found in it for the estimators.
        bp_lambda: Lambda of BP(lambda) by boundary.
        loss_denominator: What the user's loss is divided by.
        elements_per_row: Elements of the network's output per row, if one was seen.
        accumulate: Number of forward passes whose losses the user averages.
        scale: What a gradient scaler multiplies the loss with; None for one.
        report: Keep gradients for the report.
        probe: Keep graphs for the true gradients.
        check_values: Look at labels and synthetic gradients, which waits for an accelerator.
        keep_lessons: Keep what the estimators learnt from, for further steps on it.
    """

    batch: Any
    context: Tensor | None
    bp_lambda: Mapping[str, float]
    loss_denominator: Denominator = "batch"
    elements_per_row: int | None = None
    accumulate: int = 1
    scale: Tensor | None = None
    report: bool = False
    probe: bool = False
    check_values: bool = True
    keep_lessons: bool = False


class Step:
    """The cuts of one training step, from the first forward call to the merged gradients.

    Args:
        settings: What holds for the whole step.
        install: Gives the estimator of a boundary, building it from its first activation.
    """

    def __init__(self, settings: StepSettings, install: Callable[[str, Sequence[Tensor]], Installed]) -> None:
        self.settings = settings
        self.cuts: list[Cut] = []
        self.fired: set[str] = set()
        self.top: list[Cut] = []
        self.lessons: list[Lesson] = []
        self.elements_per_row = settings.elements_per_row
        self._install = install
        self._contexts: dict[tuple[int | None, int | None], Tensor | None] = {}
        self._owners: dict[int, tuple[TensorWeakRef, Cut]] = {}

    # ---- on the way up

    def cut(self, boundary: str, output: Any) -> Any:
        """Cut the `output` of `boundary`: differentiate the stage below, pass the value on.

        Returns:
            The same structure, with boundary tensors in place of those that carried a gradient.
        """
        self.fired.add(boundary)
        if isinstance(output, Tensor):  # most often
            return self._cross(boundary, [output], output)[0] if output.requires_grad else output
        flat, structure = pytree.tree_flatten(output)
        places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
        if not places:
            return output
        passed_on = self._cross(boundary, [flat[i] for i in places], output)
        for place, leaf in zip(places, passed_on, strict=True):
            flat[place] = leaf
        return pytree.tree_unflatten(flat, structure)

    def see_output(self, output: Any) -> None:
        """Take note of the network's `output`, and tell the estimators below that ask for it."""
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not tensors or not tensors[0].ndim:
            return
        self.elements_per_row = tensors[0].numel() // max(1, tensors[0].shape[0])
        if not any(Signal.OUTPUT in crossing.awaited for crossing in self.cuts):
            return
        for crossing in lineage(trace_stage(tensors, self._owner_of).parents):
            if Signal.OUTPUT in crossing.awaited:
                crossing.output = tensors[0].detach()
                self._arrived(crossing, Signal.OUTPUT)

    def _cross(self, boundary: str, outputs: list[Tensor], value: Any) -> list[Tensor]:
        crossing = self._open(boundary, outputs, value)
        passed_on = crossing.leaves
        self._synthesize(crossing)
        if not crossing.waits:
            self._settle(crossing)
        return passed_on

    def _open(self, boundary: str, outputs: list[Tensor], value: Any) -> Cut:
        strange = next((h.dtype for h in outputs if h.is_complex()), None)
        if strange is not None:
            raise BoundaryError(
                f"Expected real activations at boundary {boundary!r}, but got {strange}. Choose a "
                "module whose output is real."
            )
        stage = trace_stage(outputs, self._owner_of, f"boundary {boundary!r}", boundary)
        self._consume(stage, f"boundary {boundary!r}")
        installed = self._install(boundary, outputs)
        bp_lambda = self.settings.bp_lambda[boundary]
        crossing = Cut(
            boundary=boundary,
            installed=installed,
            outputs=outputs,
            leaves=[h.detach().requires_grad_() for h in outputs],
            stage=stage,
            factor=self._factor(outputs, value),
            bp_lambda=bp_lambda,
            waits=bp_lambda > 0 or Lock.UPDATE in installed.estimator.locks,
            retained=self.settings.probe,
        )
        for leaf in crossing.leaves:
            self._owners[id(leaf)] = (TensorWeakRef(leaf), crossing)
        self.cuts.append(crossing)
        return crossing

    def _owner_of(self, leaf: Tensor) -> Cut | None:
        entry = self._owners.get(id(leaf))
        return entry[1] if entry is not None and entry[0]() is leaf else None

    def _consume(self, stage: Stage[Cut], consumer: str) -> None:
        for parent in stage.parents:
            if parent.consumer is not None:
                raise BoundaryError(
                    f"A path leaks around {parent.consumer}: the output of boundary "
                    f"{parent.boundary!r} goes into it and past it, to {consumer}. Choose as boundary "
                    "a module that contains both ways, so that one output carries everything upwards."
                )
            parent.consumer = consumer

    def _factor(self, outputs: Sequence[Tensor], value: Any) -> float | Tensor:
        s = self.settings
        divisor = denominator(s.loss_denominator, s.batch, value, rows_of(outputs), self.elements_per_row)
        factor = 1.0 / (divisor * s.accumulate)
        return factor if s.scale is None else factor * s.scale

    def _synthesize(self, crossing: Cut) -> None:
        s, estimator = self.settings, crossing.installed.estimator
        context = self._context_for(crossing)
        h = tuple(
            leaf.detach().to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in crossing.leaves
        )
        learned = bool(crossing.installed.parameters)
        with _estimating(h[0], grad=learned and estimator.keeps_graph and not s.keep_lessons):
            gradient, state = estimator.synthesize(h, context, None)
        if gradient is not None:
            _check_gradient(gradient, h, crossing, s.check_values)
            crossing.synthetic = tuple(g.detach() for g in gradient)
            if s.loss_denominator == "elements" and self.elements_per_row is None:
                _check_zero(crossing)
        if learned or crossing.waits:
            crossing.record = Record(h, context, gradient, state)
            crossing.awaited = set(estimator.needs)
            self._arrived(crossing)

    def _context_for(self, crossing: Cut) -> Tensor | None:
        estimator = crossing.installed.estimator
        expected = (estimator.num_classes, estimator.context_size)
        if expected not in self._contexts:
            self._contexts[expected] = check_context(
                self.settings.context, *expected, crossing.who, self.settings.check_values
            )
        return self._contexts[expected]

    # ---- settling: everything that is due as soon as something has arrived

    def _settle(self, crossing: Cut) -> None:
        """Differentiate the stage below `crossing`, then every stage that this lets go on."""
        due = [crossing]
        while due:
            current = due.pop()
            gradients = current.applied_gradient()
            if gradients is not None:
                current.param_grads = local_gradients(
                    current.outputs, gradients, current.stage.variables, current.retained
                )
            self._let_go(current)
            for parent in current.stage.parents:
                self._deliver(parent)
                if parent.waits:
                    due.append(parent)

    def _let_go(self, crossing: Cut) -> None:
        if not self.settings.report:
            crossing.synthetic = crossing.arrived = None
        if not crossing.retained:
            crossing.outputs = []

    def _deliver(self, crossing: Cut) -> None:
        """Hand `crossing` what the differentiated stage above has left at its boundary tensors."""
        crossing.take_arrived()
        if Signal.TARGET in crossing.awaited or self.settings.report:
            crossing.target = crossing.target_gradient(reuse=not (crossing.waits or self.settings.report))
        if crossing.waits and crossing.record is not None:
            feedback = Feedback(target=crossing.target, output=crossing.output)
            corrected = crossing.installed.estimator.correct(crossing.record, feedback)
            crossing.synthetic = corrected if corrected is not None else crossing.synthetic
        self._arrived(crossing, Signal.TARGET)
        if not self.settings.report:
            crossing.target = None
            if not crossing.waits:
                crossing.arrived = None
        if not (crossing.retained or self.settings.report):
            crossing.leaves = []

    def _arrived(self, crossing: Cut, signal: Signal | None = None) -> None:
        """Let the estimator learn once all that it asked for is there."""
        crossing.awaited.discard(signal)
        if crossing.awaited or crossing.record is None:
            return
        feedback = Feedback(target=crossing.target, output=crossing.output)
        record, crossing.record, crossing.output = crossing.record, None, None
        share = 1.0 / self.settings.accumulate
        with _estimating(record.h[0], grad=True):
            loss = crossing.installed.estimator.loss(record, feedback)
            if loss is None:
                return
            crossing.estimator_grads = local_gradients(
                [loss if share == 1.0 else loss * share], None, crossing.installed.parameters
            )
        if self.settings.report:
            crossing.loss = loss.detach()
        if self.settings.keep_lessons:
            self.lessons.append((crossing.installed, record, feedback, share))

    # ---- on the way down

    def prepare(self, loss: Tensor) -> None:
        """Check the way down from `loss`, before it is differentiated.

        Raises:
            BoundaryError: A boundary did not run, or a path leaks around one.
        """
        if not loss.requires_grad:
            return
        stage = trace_stage([loss], self._owner_of, "the loss")
        self._consume(stage, "the loss")
        absent = [name for name in self.settings.bp_lambda if name not in self.fired]
        if absent:
            raise BoundaryError(
                f"Expected every boundary to run in the forward pass that reached the loss, but "
                f"{absent} did not (ran: {sorted(self.fired)}). Call the module itself, not its "
                "`forward`, with gradients enabled and outside compiled regions that contain it; or "
                "leave it out of `boundaries`."
            )
        self.top = stage.parents

    def finish(self) -> list[Cut]:
        """Settle what the differentiated loss left at the topmost cuts, and merge all gradients.

        Returns:
            The cuts that count, topmost first.

        Raises:
            EstimatorError: An estimator that counts was never told the network's output.
        """
        for crossing in self.top:
            self._deliver(crossing)
            if crossing.waits:
                self._settle(crossing)
        counted = lineage(self.top)
        valid = [crossing for crossing in reversed(self.cuts) if crossing in counted]
        for crossing in valid:
            if Signal.OUTPUT in crossing.awaited:
                raise EstimatorError(
                    f"Expected the network's output for {crossing.who}, but the output module did not run above it. "
                    "Pass `output=` the name of the submodule whose output is the network's output."
                )
            accumulate(crossing.param_grads)
            accumulate(crossing.estimator_grads)
        return valid


def _estimating(h: Tensor, grad: bool) -> AbstractContextManager[object]:
    """Run an estimator in its own precision, with or without a graph."""
    device = h.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False) if grad else _no_grad_in_full_precision(device)
    return nullcontext() if grad and torch.is_grad_enabled() else torch.set_grad_enabled(grad)


@contextmanager
def _no_grad_in_full_precision(device: str) -> Iterator[None]:
    with torch.autocast(device, enabled=False), torch.no_grad():
        yield


def _check_gradient(
    gradient: Sequence[Tensor], h: Sequence[Tensor], crossing: Cut, check_values: bool
) -> None:
    if len(gradient) != len(h) or any(g.shape != t.shape for g, t in zip(gradient, h, strict=True)):
        expected, got = [tuple(t.shape) for t in h], [tuple(t.shape) for t in gradient]
        raise EstimatorError(
            f"Expected {crossing.who} to give one gradient per activation, of shapes {expected}, but got "
            f"{got}."
        )
    # a sum is finite unless a term is not, or unless it overflows: only then look closer
    if check_values and not all(
        math.isfinite(g.detach().sum().item()) or bool(g.isfinite().all()) for g in gradient
    ):
        raise EstimatorError(
            f"Expected {crossing.who} to give finite gradients, but got some that are not. Lower the "
            "learning rate of `estimator_optimizer`, or of the network."
        )


def _check_zero(crossing: Cut) -> None:
    assert crossing.synthetic is not None
    if any(bool(g.any()) for g in crossing.synthetic):
        raise EstimatorError(
            f"Expected {crossing.who} to start at exactly zero, because loss_denominator='elements' is "
            "only known after the first forward pass. Pass a callable `loss_denominator` instead."
        )
