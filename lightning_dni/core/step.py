"""One decoupled training step: cut on the way up, settle on the way down.

1. The forward pass reaches a boundary with activation `h`; a detached copy is passed on.
2. The boundary's estimator gives SG(h, c). The stage below is differentiated against it at once, its
   gradients are set aside, its activations freed.
3. What that leaves at the boundary below is the target gradient there: its estimator's gradient is
   taken and `h` is released.
4. The loss is differentiated through the last stage only.
5. The gradients of every forward pass through which the loss came back are merged into `.grad`; those of
   other passes are dropped.
6. The user's optimizer steps, then the estimators'.

With `bp_lambda` > 0 a stage waits for its target and is differentiated against the mixture, top down; at
1 that is backprop. Stages that sit the step out are left out of 2 to 4 (`core/sparse.py`); with immediate
updates a stage steps in 2 already (`core/immediate.py`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import LAST_STAGE
from lightning_dni.core.consumer import Consumers, Layer, asks_for_consumer, look_down
from lightning_dni.core.context import check_context
from lightning_dni.core.coverage import refuse_absent
from lightning_dni.core.cut import (
    Cut,
    Lesson,
    claim,
    lambda_at,
    lineage,
    refuse_changed,
    refuse_no_gradient,
    refuse_told_twice,
    refuse_untold,
    refuse_waiting,
)
from lightning_dni.core.estimator import Feedback, Installed, Signal, rows_of
from lightning_dni.core.exchange import Named
from lightning_dni.core.owners import Owners, Past
from lightning_dni.core.probe import donated_buffer_errors
from lightning_dni.core.profile import Profile, no_profile
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.sparse import sit_out
from lightning_dni.core.stage import Stage, accumulate, local_gradients, trace_stage
from lightning_dni.core.synthesis import (
    correct,
    differentiate_loss,
    observed,
    recount,
    synthesize,
    synthesize_below,
    value_of,
)
from lightning_dni.core.value import close_value, differentiable, open_value

Context = Tensor | None
_OF_OUTPUT = {Signal.OUTPUT, Signal.OUTPUT_GRADIENT, Signal.ESTIMATOR_ABOVE}


class Step:
    """The cuts of one training step, from the first forward call to the merged gradients.

    Args:
        settings: What holds for the whole step.
        install: Gives the estimator of a boundary, building it from its first activation.
        profile: Times the phases of the step.
        past: The boundary tensors of earlier steps that somebody still holds.
    """

    def __init__(
        self,
        settings: StepSettings,
        install: Callable[[str, Sequence[Tensor]], Installed],
        profile: Profile = no_profile,
        past: Past | None = None,
    ) -> None:
        self.settings = settings
        self.cuts: list[Cut] = []
        self.fired: Counter[str] = Counter()
        self.top: list[Cut] = []
        self.loss: Tensor | None = None
        self.unspent: Tensor | None = None
        self._last: list[Tensor] = []
        self.elements_per_row = settings.elements_per_row
        self._install = install
        self._profile = profile
        self._owner_of = Owners(past or {})
        self._contexts: dict[tuple[int | None, ...], Context] = {}
        self._errors: list[tuple[list[Cut], list[Tensor]]] = []
        self.consumers = Consumers(settings.probe)

    # ---- on the way up

    def cut(self, boundary: str, output: Any) -> Any:
        """Cut the `output` of `boundary`: differentiate the stage below, pass the value on.

        Returns:
            The same structure, with boundary tensors in place of those that carried a gradient.

        Raises:
            BoundaryError: The output cannot be cut, or a path leaks around a boundary.
            EstimatorError: The estimator cannot be asked, or gives something unusable.
        """
        self.fired[boundary] += 1
        flat, structure = ([output], None) if type(output) is Tensor else open_value(boundary, output)
        places = differentiable(flat, boundary)
        if not places:
            return output
        crossing = self._open(boundary, [flat[i] for i in places], output)
        for place, leaf in zip(places, crossing.leaves, strict=True):
            flat[place] = leaf
        self._synthesize(crossing)
        if boundary in self.settings.asleep:
            sit_out(crossing, self.settings.probe, self.settings.report)
            crossing.let_go(self.settings.report)
        elif not crossing.waits:
            self._settle(crossing)
        if self.settings.exchange is not None:
            self.settings.exchange.end_group()
        return flat[0] if structure is None else close_value(flat, structure)

    def see_output(self, output: Any) -> None:
        """Take note of the network's `output`, and tell the estimators below that ask for it."""
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not tensors or not tensors[0].ndim:
            return
        self._count(tensors[0])
        if not any(_OF_OUTPUT & crossing.awaited for crossing in self.cuts):
            return
        topmost = trace_stage(tensors, self._owner_of).parents
        below = self._counted(topmost)
        asking = [crossing for crossing in below if Signal.OUTPUT_GRADIENT in crossing.awaited]
        if asking:
            gradients: list[Tensor] = []
            tensors[0].register_hook(gradients.append)  # type: ignore[no-untyped-call]
            self._errors.append((asking, gradients))
        for crossing in below:
            heard = {Signal.OUTPUT} | ({Signal.ESTIMATOR_ABOVE} if crossing in topmost else set())
            for signal in heard & crossing.awaited:
                crossing.output, crossing.output_version = tensors[0].detach(), tensors[0]._version
                self._told(crossing, signal)
                if crossing.due:
                    self._settle(crossing)

    def _count(self, output: Tensor) -> None:
        before, rows = self.elements_per_row, output.shape[0]
        if rows:  # a batch without any tells nothing
            self.elements_per_row = output.numel() // rows
            if self.settings.loss_denominator == "elements":
                recount(self.cuts, self.settings, before, self.elements_per_row)

    def _open(self, boundary: str, outputs: list[Tensor], value: Any) -> Cut:
        stage = trace_stage(outputs, self._owner_of, f"boundary {boundary!r}", boundary)
        self._consume(stage, f"boundary {boundary!r}", outputs)
        installed = self._install(boundary, outputs)
        bp_lambda = lambda_at(boundary, installed, self.settings.bp_lambda[boundary])
        passed = self.settings.cross(boundary, outputs, self.fired[boundary])
        crossing = Cut(
            boundary=boundary,
            installed=installed,
            outputs=outputs,
            leaves=passed.leaves,
            predicted=passed.synthetic,
            input_error=passed.error,
            input_grads=passed.gradients,
            stage=stage,
            factor=self.settings.factor(outputs, value, self.elements_per_row),
            bp_lambda=bp_lambda,
            waits=bp_lambda > 0 or bool(installed.estimator.locks),
            elements_unknown=self.settings.counts_elements and self.elements_per_row is None,
            age=installed.estimator.delay,
        )
        refuse_waiting(crossing)
        self._owner_of.add(crossing)
        self.cuts.append(crossing)
        return crossing

    def held(self) -> Past:
        """The boundary tensors of this step and of earlier ones, for the next step to look after."""
        return self._owner_of.held()

    def _consume(self, stage: Stage[Cut], consumer: str, outputs: Sequence[Tensor]) -> None:
        if self.settings.updates is not None:
            self.settings.updates.refuse_updated(stage.variables, consumer)
        claim(stage.parents, consumer)
        if any(map(asks_for_consumer, stage.parents)):
            self.consumers.end_stage(look_down(outputs, self._owner_of))

    def read(self, name: str, layer: Layer, x: Tensor, notes: bool) -> Tensor | None:
        """What `layer` shall read instead of `x`, None for `x` itself; see `Consumers.enter`."""
        if not torch.is_grad_enabled() or not x.requires_grad:
            return None
        reach = look_down([x], self._owner_of)
        for crossing in reach.cuts:
            if Signal.CONSUMER in crossing.awaited:
                self._told(crossing, Signal.CONSUMER)
        return self.consumers.enter(name, layer, x, reach, notes)

    def _synthesize(self, crossing: Cut) -> None:
        estimator = crossing.installed.estimator
        context = self.context_for(crossing)
        record = synthesize(crossing, context, self.settings)
        if record.gradient is not None:
            crossing.synthetic = tuple(g.detach() for g in record.gradient)
        if crossing.predicted:
            synthesize_below(crossing, context)
        if crossing.installed.parameters or crossing.waits:
            crossing.record = record
            crossing.awaited = set(estimator.needs)
            self._told(crossing)
        for below in (cut for cut in crossing.stage.parents if Signal.ESTIMATOR_ABOVE in cut.awaited):
            below.above = value_of(crossing, record)
            self._told(below, Signal.ESTIMATOR_ABOVE)

    def context_for(self, crossing: Cut) -> Context:
        """The context that the estimator of `crossing` asks for, checked.

        Raises:
            EstimatorError: There is none, or it does not fit.
        """
        estimator, rows = crossing.installed.estimator, rows_of(crossing.leaves)
        expected = (estimator.num_classes, estimator.context_size, estimator.ignore_index, rows)
        if expected not in self._contexts:
            found = check_context(self.settings.context, *expected, crossing.who, self.settings.check_values)
            self._contexts[expected] = found if found is None else found.clone()  # it may be written over
        return self._contexts[expected]

    # ---- settling: everything that is due as soon as something has arrived

    def _settle(self, crossing: Cut) -> None:
        """Differentiate the stage below `crossing`, then every stage that this lets go on."""
        due = [crossing]
        while due:
            current = due.pop()
            self._differentiate(current)
            for parent in current.stage.parents:
                parent.age += current.age if parent.waits else 0
                self._deliver(parent)
                if parent.due:
                    due.append(parent)

    def _differentiate(self, crossing: Cut) -> None:
        crossing.closed = True
        if crossing.waits and crossing.record is not None:
            if crossing.installed.estimator.locks:
                refuse_changed(crossing.output, crossing.output_version, crossing.who)
            correct(crossing, crossing.record, crossing.feedback())
        parents = [] if self.settings.report else crossing.stage.parents
        deaf = bool(parents) and not any(parent.hears_from_above for parent in parents)
        gradients = crossing.applied_gradient()
        if crossing.waits and self.settings.skips and gradients is not None:
            crossing.applied = observed(gradients)
        if gradients is not None:
            with (
                self._profile("dni.local_backward"),
                donated_buffer_errors(crossing.boundary) if self.settings.probe else nullcontext(),
            ):
                crossing.param_grads = local_gradients(
                    *crossing.reached(gradients), crossing.stage.variables, self.settings.probe, deaf
                )
            if self.settings.exchange is not None:
                self.settings.exchange.offer(crossing.param_grads)
        if self.settings.updates is not None:
            self.settings.updates.take(crossing, self.fired)
        if not self.settings.probe:
            crossing.outputs = []
        crossing.let_go(self.settings.report)

    def _deliver(self, crossing: Cut) -> None:
        """Hand `crossing` what the differentiated stage above has left at its boundary tensors."""
        crossing.take_arrived()
        needed = Signal.TARGET in crossing.awaited and not self._makes_no_target(crossing)
        if self.settings.report or needed:
            crossing.target = crossing.target_gradient()
        self._told(crossing, Signal.TARGET)
        if not self.settings.report:
            crossing.leaves = []

    def _makes_no_target(self, crossing: Cut) -> bool:
        """Whether its estimator goes without the target, though it asks for what arrives."""
        estimator = crossing.installed.estimator
        learns = crossing.learns_from_arrived and not self.settings.keep_lessons and not estimator.locks
        return learns or estimator.relays

    def _told(self, crossing: Cut, signal: Signal | None = None) -> None:
        """Let the estimator learn once it has been told all that it asked for."""
        crossing.awaited.discard(signal)
        if crossing.record is not None and not crossing.awaited and not crossing.learned:
            crossing.learned = True
            refuse_changed(crossing.output, crossing.output_version, crossing.who)
            self._learn(crossing, crossing.feedback())
        crossing.let_go(self.settings.report)

    def _learn(self, crossing: Cut, feedback: Feedback) -> None:
        record, share = crossing.record, 1.0 / self.settings.accumulate
        if record is None or not crossing.installed.parameters:
            return
        made = differentiate_loss(crossing, feedback, share, self.settings)
        if made is None:
            return
        crossing.estimator_grads = made
        if self.settings.exchange is not None:
            self.settings.exchange.offer(crossing.estimator_grads)
        if self.settings.keep_lessons:
            crossing.lesson = (crossing.installed, record, feedback, share)

    # ---- on the way down

    def prepare(self, loss: Tensor) -> None:
        """Check the way down from `loss`, before it is differentiated.

        Raises:
            BoundaryError: A boundary did not run, or a path leaks around one.
        """
        self.loss = loss.detach()
        if not loss.requires_grad:
            return
        stage = trace_stage([loss], self._owner_of, "the loss")
        self._consume(stage, "the loss", [loss])
        refuse_absent(self.settings, self.fired, self.cuts, stage)
        self.top, self._last = stage.parents, stage.variables
        if self.settings.probe and LAST_STAGE in self.settings.asleep:
            self.unspent = loss

    def finish(self) -> list[Cut]:
        """Settle what the differentiated loss left at the topmost cuts.

        Returns:
            The cuts that count, topmost first.

        Raises:
            EstimatorError: An estimator that counts was not told what it asked for.
        """
        runs = LAST_STAGE not in self.settings.asleep
        if runs:
            self._come_back()
        counted = self._counted(self.top)
        self.cuts = [crossing for crossing in self.cuts if crossing not in counted]
        for crossing in counted:
            crossing.consumed = True
            if runs:
                refuse_untold(crossing)
        return counted

    def _come_back(self) -> None:
        """Hand the topmost cuts what the loss has left there."""
        if self.settings.exchange is not None:
            self.settings.exchange.offer_accumulated(self._last)
        self._hear_errors()
        for crossing in self.top:
            refuse_no_gradient(crossing)
            self._deliver(crossing)
            if crossing.due:
                self._settle(crossing)

    def _hear_errors(self) -> None:
        """Tell the estimators the gradient at the network's output that the loss has left."""
        for asking, gradients in self._errors:
            for crossing in reversed(asking) if gradients else ():  # the lowest first: none needs another
                refuse_told_twice(crossing)
                dtype = torch.promote_types(gradients[-1].dtype, torch.float32)
                crossing.output_gradient = gradients[-1].detach().to(dtype) / crossing.factor
                self._told(crossing, Signal.OUTPUT_GRADIENT)
                if crossing.due:
                    self._settle(crossing)
        self._errors = [entry for entry in self._errors if not entry[1]]

    def merge(self, counted: Sequence[Cut], named: Named) -> list[Lesson]:
        """Add the gradients of the cuts that count to `.grad`, averaged over replicas where there are any.

        Args:
            counted: The cuts that count, topmost first.
            named: Gives the parameters that replicas share.

        Returns:
            What to learn from again.
        """
        made = [(*c.param_grads, *c.estimator_grads, *c.input_grads) for c in counted]
        gradients = [pair for each in made for pair in each]
        if self.settings.exchange is None:
            accumulate(gradients)
        else:
            self.settings.exchange.merge(gradients, named)
        for crossing in counted:
            if crossing.lesson is not None:
                refuse_changed(crossing.lesson[2].output, crossing.output_version, crossing.who)
        for crossing in counted:  # who asks for a second backward pass is told so, but keeps nothing alive
            crossing.param_grads, crossing.estimator_grads, crossing.input_grads = [], [], []
            crossing.stage = Stage([], [])
        return [crossing.lesson for crossing in counted if crossing.lesson is not None]

    def _counted(self, top: Sequence[Cut]) -> list[Cut]:
        counted = lineage(top)
        return [crossing for crossing in reversed(self.cuts) if crossing in counted]
