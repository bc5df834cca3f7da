"""One crossing of one boundary: the graph below, the value passed on, and what is still awaited."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dni.core.estimator import (
    Feedback,
    Gradient,
    Installed,
    Lock,
    Record,
    Signal,
    who,
)
from lightning_dni.core.stage import Stage
from lightning_dni.core.target import mix_gradients
from lightning_dni.errors import BoundaryError, EstimatorError, StageError

if TYPE_CHECKING:
    from lightning_dni.core.consumer import Swap

Lesson = tuple[Installed, Record, Feedback, float]
"""What an estimator learns from and with what share, kept where it takes several steps on it."""


@dataclass(eq=False, slots=True)
class Cut:
    """State of one crossing between its forward call and the end of the step.

    Attributes:
        boundary: Name of the boundary.
        installed: Its estimator.
        outputs: What the module returned, with the stage's graph; empty once that is let go.
        leaves: What was passed on instead; empty once the stage above was differentiated.
        stage: The stage below.
        factor: A synthetic gradient times this is in units of the user's (scaled) loss.
        bp_lambda: Weight of the true gradient.
        waits: Whether the stage is only differentiated when its target has arrived.
        elements_unknown: Whether `factor` still lacks the number of output elements.
        elements_seen: Whether the output of its forward call has told that number.
        divided: Whether a stage was given a synthetic gradient times `factor`.
        consumed: Whether the loss has come back through it.
        consumer: What differentiates the stage above, for messages.
        record: What the estimator said, until its loss and its correction were taken.
        awaited: What the estimator still has to be told.
        learned: Whether its loss was taken.
        delivered: Whether the stage above was differentiated.
        closed: Whether the stage below was differentiated, or sits this step out.
        asleep: Whether it sits this step out.
        predicted: Whether what was passed on is a synthetic input.
        input_error: Squared distance of the synthetic input and the square of the real one, for reports.
        age: How many optimizer steps later the stage is given its gradient.
        synthetic: The synthetic gradient, in the estimator's units; None for exactly zero.
        below: The same at the stage's own output, where something else was passed on.
        arrived: What came back from above, in units of the user's loss; None for exactly zero.
        unreached: Places of the leaves to which nothing came back, where anything came back to others.
        target: The same in the estimator's units, where somebody asks for it.
        output: The network's output for these rows.
        output_version: Number of changes in place that it had gone through when it was seen.
        output_gradient: The gradient there, in the estimator's units.
        above: What the estimator above predicts.
        swaps: The calls of layers whose vector-Jacobian product the estimator gives.
        loss: The estimator's loss, for reports.
        said: A scalar that is finite if the synthetic gradient is.
        applied: A scalar that is finite if what was mixed from it is; None where that is not asked.
        learnt: A scalar that is finite if what the estimator learns from is.
        lesson: What further steps of the estimator learn from.
        param_grads: Gradients of the stage's variables, until they are merged.
        estimator_grads: Gradients of the estimator's parameters, until they are merged.
        input_grads: Those of the input estimator's, until they are merged.
    """

    boundary: str
    installed: Installed
    outputs: list[Tensor]
    leaves: list[Tensor]
    stage: "Stage[Cut]"
    factor: float | Tensor
    bp_lambda: float
    waits: bool
    elements_unknown: bool
    elements_seen: bool = False
    divided: bool = False
    consumed: bool = False
    consumer: str | None = None
    record: Record | None = None
    awaited: set[Signal] = field(default_factory=set)
    learned: bool = False
    delivered: bool = False
    closed: bool = False
    asleep: bool = False
    predicted: bool = False
    input_error: Tensor | None = None
    age: int = 0
    synthetic: Gradient | None = None
    below: Gradient | None = None
    arrived: list[Tensor] | None = None
    unreached: list[int] = field(default_factory=list)
    target: Gradient | None = None
    output: Tensor | None = None
    output_version: int = 0
    output_gradient: Tensor | None = None
    above: Tensor | None = None
    swaps: "list[Swap]" = field(default_factory=list)
    loss: Tensor | None = None
    said: Tensor | None = None
    applied: Tensor | None = None
    learnt: Tensor | None = None
    lesson: Lesson | None = None
    param_grads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    estimator_grads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    input_grads: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def who(self) -> str:
        """The estimator by kind and place, for messages."""
        return who(self.installed.estimator, self.boundary)

    @property
    def due(self) -> bool:
        """Whether a stage that waited can be differentiated now."""
        locks = self.installed.estimator.locks
        direct = Lock.UPDATE in locks and Lock.BACKWARD not in locks and self.bp_lambda == 0
        arrived = self.delivered or direct
        return self.waits and arrived and not self.closed and not (locks and self.awaited)

    @property
    def hears_from_above(self) -> bool:
        """Whether what comes back from above is used for anything but a report."""
        return self.bp_lambda > 0 or Signal.TARGET in self.installed.estimator.needs

    def feedback(self) -> Feedback:
        """What is there for the estimator to be told."""
        return Feedback(
            target=self.target,
            output=self.output,
            output_gradient=self.output_gradient,
            consumer=self.swaps[0].layer if self.swaps else None,
            above=self.above,
        )

    @property
    def ran(self) -> bool:
        """Whether the stage below was differentiated."""
        return self.closed and not self.asleep

    def take_arrived(self) -> None:
        """Collect what the stage above left at the boundary tensors."""
        self.delivered = True
        grads = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        self.note_arrived(grads)

    def note_arrived(self, gradients: Sequence[Tensor | None]) -> None:
        """Take note of what came back to each leaf; None for nothing."""
        self.unreached = [k for k, g in enumerate(gradients) if g is None]
        if any(g is not None for g in gradients):
            self.arrived = [
                leaf.new_zeros(leaf.shape) if g is None else g
                for g, leaf in zip(gradients, self.leaves, strict=True)
            ]

    def let_go(self, keep: bool) -> None:
        """Drop what neither the estimator nor the stage needs any more.

        Args:
            keep: Whether a report still needs what was said and what came back.
        """
        if self.learned and (self.closed or not self.waits):
            self.record = self.output = self.output_gradient = self.above = None
        if keep or not self.closed:
            return
        self.synthetic = self.below = None
        if self.delivered:
            self.arrived = None
            if self.learned or self.record is None:
                self.target = None

    @property
    def learns_from_arrived(self) -> bool:
        """Whether the SG loss is differentiated from what arrived, without making the target first."""
        record = self.record
        return (
            self.installed.explicit
            and isinstance(self.factor, float)
            and self.arrived is not None
            and record is not None
            and record.gradient is not None
            and all(g.dtype == t.dtype for g, t in zip(record.gradient, self.arrived, strict=True))
        )

    def target_gradient(self) -> Gradient:
        """What arrived, in the estimator's units and precision."""
        dtypes = [torch.promote_types(leaf.dtype, torch.float32) for leaf in self.leaves]
        if self.arrived is None:
            return tuple(
                leaf.new_zeros(leaf.shape, dtype=d) for leaf, d in zip(self.leaves, dtypes, strict=True)
            )
        scale = 1.0 / self.factor
        return tuple(g.to(d) * scale for g, d in zip(self.arrived, dtypes, strict=True))

    def applied_gradient(self) -> list[Tensor] | None:
        """The gradient for the stage below, in units of the user's loss; None for exactly zero."""
        bp_lambda = self.bp_lambda
        synthetic = None
        said = self.synthetic if self.below is None else self.below
        if said is not None and bp_lambda < 1.0:
            self.divided = True
            synthetic = [(g * self.factor).to(h.dtype) for g, h in zip(said, self.outputs, strict=True)]
        if not self.waits or bp_lambda == 0.0:
            return synthetic
        if self.arrived is None:
            return synthetic and [g * (1.0 - bp_lambda) for g in synthetic]
        if synthetic is None:
            return [g if bp_lambda == 1.0 else g * bp_lambda for g in self.arrived]
        return [mix_gradients(s, t, bp_lambda) for s, t in zip(synthetic, self.arrived, strict=True)]

    def reached(self, gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that a gradient is for, with theirs of the `gradients` applied.

        One to which nothing came back, where nothing else is said, has none: not zero, as in backprop.
        """
        said = self.synthetic if self.below is None else self.below
        without = self.unreached if self.waits and (said is None or self.bp_lambda == 1.0) else []
        pairs = zip(self.outputs, gradients, strict=True)
        kept = [pair for k, pair in enumerate(pairs) if k not in without]
        return [h for h, _ in kept], [g for _, g in kept]


def lineage(top: Iterable[Cut]) -> set[Cut]:
    """The cuts in `top` and all those below, through whose forward calls the loss came back."""
    found = set(top)
    queue = list(found)
    while queue:
        for parent in queue.pop().stage.parents:
            if parent not in found:
                found.add(parent)
                queue.append(parent)
    return found


def claim(parents: Iterable[Cut], consumer: str) -> None:
    """Note that `consumer` goes on from what `parents` have passed on.

    Raises:
        BoundaryError: Something else does already, or the loss has come back that way.
    """
    for parent in parents:
        if parent.consumed:
            raise BoundaryError(
                f"Expected one backward pass through each forward pass, but {consumer} reaches boundary "
                f"{parent.boundary!r} in a forward pass that {parent.consumer} has already come back "
                "through. Add the losses up, or run the forward pass once more."
            )
        if parent.consumer is not None:
            raise BoundaryError(
                f"A path leaks around {parent.consumer}: the output of boundary "
                f"{parent.boundary!r} goes into it and past it, to {consumer}. Choose as boundary "
                "a module that contains both ways, so that one output carries everything upwards."
            )
        parent.consumer = consumer


def lambda_at(boundary: str, installed: Installed, asked: float) -> float:
    """The weight of what comes back at a boundary: what was `asked`, and 1 where the estimator is just that.

    Raises:
        EstimatorError: Something was asked, but what comes back there is another gradient than the true one.
    """
    estimator = installed.estimator
    if not estimator.relays:
        return asked
    if asked and (estimator.delay or Signal.CONSUMER in estimator.needs):
        raise EstimatorError(
            f"Expected bp_lambda=0 for {who(estimator, boundary)}, beside which no true gradient is there to "
            f"mix in, but got {asked}. Pass bp_lambda={{{boundary!r}: 0.0, ...}}, or for backprop "
            f"estimator={{{boundary!r}: BackpropEstimator, ...}}."
        )
    return 1.0


def refuse_waiting(cut: Cut) -> None:
    """Refuse a stage that waits for what comes back to something that it has not made.

    Raises:
        EstimatorError: A synthetic input was passed on.
    """
    if cut.predicted and cut.waits:
        what = cut.who if cut.installed.estimator.locks else f"bp_lambda={cut.bp_lambda} for {cut.who}"
        raise EstimatorError(
            f"Expected a stage that waits for nothing below a synthetic input, but got {what}. Pass "
            f"synthetic_inputs={{{cut.boundary!r}: None, ...}}, bp_lambda=0, or another estimator."
        )


def refuse_no_gradient(cut: Cut) -> None:
    """Refuse a backward pass that had a way to `cut` and did not go it.

    Raises:
        StageError: Nothing came back.
    """
    if all(leaf.grad is None for leaf in cut.leaves):
        raise StageError(
            f"Expected the loss to come back to boundary {cut.boundary!r}, but nothing did: it was "
            "differentiated for other tensors only. Call backward without `inputs`."
        )


def refuse_untold(cut: Cut) -> None:
    """Refuse an estimator that counts and was not told what it asked for.

    Raises:
        EstimatorError: Something was never there.
    """
    if {Signal.OUTPUT, Signal.ESTIMATOR_ABOVE} & cut.awaited:
        raise EstimatorError(
            f"Expected the network's output for {cut.who}, but the output module did not run "
            "above it. Pass `output=` the name of the submodule whose output is the network's output."
        )
    if Signal.OUTPUT_GRADIENT in cut.awaited:
        raise EstimatorError(
            f"Expected the gradient at the network's output for {cut.who}, but the loss did not come back "
            "through the output module. Pass `output=` the name of the submodule of whose output the loss "
            "is computed."
        )
    if Signal.CONSUMER in cut.awaited:
        raise EstimatorError(
            f"Expected a linear layer or convolution to read the output of boundary {cut.boundary!r} for "
            f"{cut.who}, but none did (nn.Linear and nn.Conv1d to nn.Conv3d, called as modules). Choose "
            "another boundary or estimator; pass the estimator's class or a partial of it where "
            "torch.compile is used."
        )


def refuse_told_twice(cut: Cut) -> None:
    """Refuse a second output whose gradient an estimator would never hear of.

    Raises:
        EstimatorError: It has been told one.
    """
    if Signal.OUTPUT_GRADIENT not in cut.awaited:
        raise EstimatorError(
            f"Expected one gradient at the network's output for {cut.who}, but the loss came back through "
            "several calls of the output module above it. Pass `output=` the name of a submodule that runs "
            "once and whose output carries all that the loss is computed of."
        )


def refuse_changed(output: Tensor | None, version: int, who: str) -> None:
    """Refuse an output of the network that an estimator has still to learn from, and is another one by now.

    Args:
        output: What was seen.
        version: Number of changes in place that it had gone through then.
        who: The estimators, named in the error.

    Raises:
        EstimatorError: It was changed in place.
    """
    if output is not None and output._version != version:
        raise EstimatorError(
            f"Expected the network's output for {who} to stay as the output module gave it, but it was "
            "changed in place. Make the change out of place, or in the output module."
        )


def refuse_unseen(step: Any) -> None:
    """Refuse the loss of an earlier step, if there is one, that the engine has not seen.

    Raises:
        StageError: It was differentiated nevertheless.
    """
    if step is not None and step.loss is None:
        refuse_other_backward(step.cuts)


def refuse_other_backward(cuts: Iterable[Cut]) -> None:
    """Refuse a loss that was differentiated without the engine's knowledge.

    Raises:
        StageError: Something came back through a cut that nobody has settled.
    """
    for cut in cuts:
        if not cut.delivered and any(leaf.grad is not None for leaf in cut.leaves):
            raise StageError(
                f"Expected every loss to be differentiated by `manual_backward` (or `engine.backward`), but "
                f"got another way through boundary {cut.boundary!r}, of which the stages below never hear. "
                "Call `self.manual_backward(loss)`, in a loop of your own `engine.backward(loss)`, instead "
                "of `loss.backward()`."
            )
