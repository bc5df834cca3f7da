"""StageEngine: one stage of a pipeline, which goes on without waiting for what comes back.

One batch at stage k, at `staleness` D:

1. The activation of the stage below arrives; the stage runs on it up to its own boundary.
2. Its output h is sent on. The estimator there gives SG(h, c), the stage is differentiated against it, and
   what that leaves at the lower boundary is sent back: the target gradient of the stage below.
3. The user's optimizer steps.
4. The target gradient of D updates ago arrives, and the estimator learns from it.

The lag is part of the algorithm, so a run is the same to the bit however fast each stage is. At D = 0 it is
what `DNIEngine` does in one process. Where `bp_lambda` > 0, step 2 waits for the target gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from lightning_dni.core.consumer import asks_for_consumer
from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Signal
from lightning_dni.core.pool import may_ask
from lightning_dni.core.report import report_boundary
from lightning_dni.core.settings import Scale, StepSettings
from lightning_dni.core.stage import accumulate, in_place_errors
from lightning_dni.core.synthesis import value_of
from lightning_dni.core.tap import Taps
from lightning_dni.pipeline.clock import Activity
from lightning_dni.pipeline.crossing import (
    Received,
    ask,
    differentiate,
    differentiate_truly,
    gradients_at,
    learn,
    open_cut,
    say_again,
)
from lightning_dni.pipeline.inbox import Inbox
from lightning_dni.pipeline.late import Late, delays_in_common, warn_of_dropped
from lightning_dni.pipeline.message import Kind
from lightning_dni.pipeline.output import Output
from lightning_dni.pipeline.passage import Passage
from lightning_dni.pipeline.pending import Pending, gradient_of, load, save
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.readers import Readers
from lightning_dni.pipeline.refusals import refuse_what_is_told
from lightning_dni.pipeline.restoring import pending_of, restrict
from lightning_dni.pipeline.returns import Returns
from lightning_dni.pipeline.staged import TRAINING, StagedEngine

T = TypeVar("T")


class StageEngine(StagedEngine):
    """Trains one stage of a model on synthetic gradients, beside the engines of the other stages.

    It takes the arguments of `DNIEngine`; `join` and `place` say which stage it is, once that is known.
    """

    def _reset(self) -> None:
        super()._reset()
        self._taps = Taps()
        self._inbox = Inbox(self._links, 0, 0)
        self._step: StepSettings | None = None
        self._crossing: Pending | None = None
        self._late: Late | None = None
        self._output = Output()
        self._returns = Returns()
        self._readers = Readers(self._model, self._pool)
        self._loss: Tensor | None = None
        self._number, self._updates, self._delays = 0, -1, False
        self._saved: Mapping[str, Any] | None = None

    def _take_staleness(self) -> None:
        self._delays = delays_in_common(self._pool.factories, self._staleness)

    def _take_part(self, plan: StagePlan) -> None:
        self._elements_per_row = self._elements_per_row or plan.elements_per_row
        self._readers.take_part(self._below)
        kept = [crossing for crossing in self._inbox.pending if crossing.is_complete]
        above = len(plan.boundaries) - self.stage
        self._inbox = Inbox(self._links, self._staleness, above)
        self._inbox.restore(kept)  # of a fit before this one
        if self._late and self._saved is None:  # else it was said what of the saved state is left out
            warn_of_dropped(len(self._late), self._boundary)
        late = self._delays and above > 0
        self._late = Late(self._staleness, above, self._inbox.take_gradient) if late else None
        factories = self._pool.factories.values()
        with_gradient = may_ask(factories, {Signal.OUTPUT_GRADIENT})
        with_value = may_ask(factories, {Signal.OUTPUT, Signal.ESTIMATOR_ABOVE})
        self._output = Output(self._links.output_out, with_gradient, with_value)
        below = [self._pool.factories[self._below]] if self._below is not None else []
        self._returns = Returns(self._links.gradient_out, may_ask(below, {Signal.ESTIMATOR_ABOVE}))
        if self._saved is not None:
            self._take_over(self._saved)

    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""
        self._taps.remove()
        super().detach()
        self._step = self._crossing = None
        self._output.begin()
        self._readers.forget()

    def _use(self, step: str) -> Passage:
        fresh = self._current is None or self._passages.get(step) is not self._current
        passage = super()._use(step)
        if fresh and step == TRAINING:
            if self.is_last:
                self._taps.attach(self._model, {}, self._output_name, self._see_output)
            self._readers.attach(self._taps)
        return passage

    # ---- one step

    @contextmanager
    def training_step(
        self,
        batch: Any = None,
        *,
        accumulate: int = 1,
        scale: Scale | None = None,
        several_losses: bool = False,
        first: bool = True,
        last: bool = True,
    ) -> Iterator[None]:
        """The block around one `run`; its arguments are those of `DNIEngine.training_step`."""
        passage = self._use(TRAINING)
        self._updates += first
        self._step = self._settings(batch, accumulate, scale, several_losses, last)
        self._requested = "nothing"
        self._output.begin()
        self._number = self.clock.step = self._steps
        if self._step.report and not self.is_last:
            self._reporting.begin(self._updates)
        if self._step.exchange is not None:
            self._step.exchange.begin(fresh=first)
        passage.receive(Kind.TRAIN, self._number, batch, self.moved)
        self._readers.begin(passage.received, self._step.probe)
        boundaries = [] if self._boundary is None else [self._boundary]
        with self._drawing(self._number), in_place_errors(boundaries):
            yield
        self._steps += 1

    def run(self, step: Callable[[], T]) -> T | None:
        """Run the user's training step as this stage; None where it is not the last one."""
        own = partial(self._draw_own, self._number)
        own_weights = (p for p in self._model.parameters() if id(p) in self._own)
        late, buffers = self._late, self._model.buffers()
        stashing = nullcontext() if late is None else late.stashing(own_weights, buffers)
        with self.profile("pipeline.forward"), stashing:
            return self._placed().run(step, Kind.TRAIN, self._number, self._on_output, own)

    def _see_output(self, output: Any) -> None:
        """Take note of the network's output, on the last stage."""
        if self._step is not None:
            known = self._elements_per_row if self._step.loss_denominator == "elements" else None
            self._elements_per_row = self._output.see(output, known) or self._elements_per_row

    def _on_output(self, outputs: list[Tensor], value: Any) -> None:
        assert self._step is not None
        assert self._boundary is not None
        if not outputs:  # nothing below takes a gradient
            return
        self._readers.end_stage(outputs)
        received = self._placed().received
        cut = open_cut(self._boundary, outputs, received, self._own, self._pool.install, self._step, value)
        kind, copies = self._pool.kinds[self._boundary], self._exchange is not None
        refuse_what_is_told(cut, kind, self._staleness, self._delays, self._step, copies)
        record = ask(cut, self._step, keeps_graph=self._staleness == 0)
        crossing = Pending(cut, self._number, self._updates, 1.0 / self._step.accumulate)
        crossing.value = value_of(cut, record) if self._returns.tells else None
        self._crossing = crossing
        if not cut.waits:
            self._differentiate(crossing, received)

    def _differentiate(self, crossing: Pending, received: Received) -> None:
        cut = crossing.cut
        with self.profile("dni.local_backward"):
            assert self._step is not None
            differentiate(cut, received, keep_graph=self._step.probe)
        gradients = gradients_at(received)
        self._returns.send(gradients, crossing.step, self._elements_per_row, crossing.value)
        if self._step.exchange is not None:
            self._step.exchange.offer(cut.param_grads)

    def _send_back(self, output: Tensor | None = None) -> None:
        """Tell the stage below what its output was worth, where this one has no estimator."""
        gradients = gradients_at(self._placed().received)
        speaks = output is not None
        self._returns.send(gradients, self._number, self._elements_per_row, output=output, speaks=speaks)
        if self._step is not None and self._step.probe:
            true = self._readers.true_gradients(gradients) if self.is_last else gradients
            self._returns.send_true(true, self._number, self._elements_per_row)

    # ---- backward, as a strategy calls it around its own

    def backward(self, loss: Tensor | None) -> None:
        """Differentiate `loss` on the last stage; merge the gradients of this stage into `.grad`."""
        if loss is not None:
            self.prepare_backward(loss)
            loss.backward()  # type: ignore[no-untyped-call]
        self.finish_backward()

    def prepare_backward(self, loss: Tensor) -> Tensor:
        """First third of `backward`: look at the loss, on the last stage."""
        self._loss = loss.detach() if self.is_last else None
        if self.is_last and loss.requires_grad:
            self._readers.end_stage([loss])
        return loss

    def finish_backward(self) -> None:
        """Last third of `backward`: send back what the loss has left below, merge what was set aside."""
        crossing, self._crossing = self._crossing, None
        if self.is_last:
            self._send_back(self._output.told() if self._returns.tells else None)
            self._output.send(self._number)
            self._health.observe(self._number, self._loss, [])
            self._look()
            self._merge([])
            return
        if self._late is not None and crossing is not None:
            self._inbox.add(self._number, self._updates, None)
            self._merge(self._go_back(self._late, crossing))
            return
        self._inbox.add(self._number, self._updates, crossing)
        made: list[tuple[Tensor, Tensor]] = []
        if crossing is not None:
            if crossing.cut.waits:
                self._inbox.hear(crossing)
                say_again(crossing)
                self._differentiate(crossing, self._placed().received)
            if self._step is not None and self._step.probe:
                self._probe(crossing)
            self._examine(crossing.cut)
            made, crossing.cut.param_grads = crossing.cut.param_grads, []
        else:  # what this stage gave depends on nothing that takes a gradient: the stage below hears that
            if self._step is not None and self._step.probe:
                self._inbox.drain()
            self._send_back()
        self._merge(made)

    def _go_back(self, late: Late, crossing: Pending) -> list[tuple[Tensor, Tensor]]:
        """Have `crossing` wait, and differentiate what has waited long enough."""
        late.add(crossing, self._placed().received)
        made: list[tuple[Tensor, Tensor]] = []
        for due, received, weights in late.due(self._updates):
            with weights.restored():
                self._differentiate(due, received)
            self._examine(due.cut)
            made, due.cut.param_grads = made + due.cut.param_grads, []
        return made

    def _merge(self, made: list[tuple[Tensor, Tensor]]) -> None:
        """Add what was set aside to `.grad`, averaged over the copies of this stage where there are any."""
        self._readers.end()
        exchange = None if self._step is None else self._step.exchange
        if exchange is None:
            accumulate(made)
            return
        named = {n: p for n, p in self._model.named_parameters() if id(p) in self._own}
        if self.is_last:
            exchange.offer_accumulated(named.values())
        exchange.merge(made, lambda: named)

    def _probe(self, crossing: Pending) -> None:
        """Wait for the true gradient of this batch, hand it down, and keep what it shows.

        The loss's own gradient is what the last stage sends down in any case, but to feedback alignment. All
        others have to wait.
        """
        assert self.plan is not None
        self._inbox.drain()
        cut, received = crossing.cut, self._placed().received
        with self.profile("dni.probe"):
            as_it_came = self.stage == self.plan.stages - 2 and not asks_for_consumer(cut)
            true = gradient_of(crossing) if as_it_came else self._inbox.take_true(crossing)
            self._readers.speak_truly()
            truth, below = differentiate_truly(cut, true, received)
            self._returns.send_true(below, self._number, self._elements_per_row)
            names: dict[Tensor, str] = {p: n for n, p in self._model.named_parameters()}
            if cut.target is None:
                cut.target = cut.target_gradient()
            self._reporting.keep(crossing, report_boundary([cut], {cut: truth}, names))
        cut.outputs = []

    def _examine(self, cut: Cut) -> None:
        """Look at what the estimator said; leave it out, or stop, where that is not finite."""
        if self._health.skips:
            before = self._health.skipped[cut.boundary]
            self._health.sift([cut], keep_stage=False)
            if self._health.skipped[cut.boundary] > before:
                cut.record = None
        else:
            self._health.observe(self._number, None, [cut])
            self._look()
        cut.said = cut.applied = None

    def _look(self) -> None:
        if self._step is not None and (self._step.check_values or self._health.is_crowded):
            self._health.look(at_once=self._step.check_values)

    # ---- what came back

    def update_estimators(self) -> None:
        """Let the estimator learn from what is due; call it after the user's optimizer has stepped."""
        if self.is_last or self._step is None:
            return
        with self.clock.doing(Activity.ESTIMATOR):
            due = self._inbox.collect(self._updates)
            if self._late is not None:
                due += self._late.gone()
            if not due:
                return
            for crossing in due:
                self._learn(crossing)
            if self._exchange is not None:
                self._exchange.average(list(self._pool.named_parameters().values()))
            self._pool.remember([c.cut.lesson for c in due if c.cut.lesson is not None])
            self._reporting.close(due, self._updates, self.skipped)
            super().update_estimators()

    def _learn(self, crossing: Pending) -> None:
        assert self._step is not None
        cut = crossing.cut
        if crossing.gradient is not None and crossing.gradient.facts:
            self._elements_per_row = int(crossing.gradient.facts[0]) or None
        reports = self._reporting.is_open(crossing)
        learn(crossing, replace(self._step, report=reports), self._updates - crossing.update)
        if reports:
            self._reporting.observe(crossing)
        if self._health.skips:
            self._health.sift([cut], keep_stage=True)
        else:
            self._health.observe(crossing.step, None, [cut])
            self._look()
        accumulate(cut.estimator_grads)
        cut.estimator_grads, cut.record = [], None

    def _describe_part(self) -> dict[str, object]:
        return self._readers.describe()

    @property
    def skipped(self) -> dict[str, int]:
        """Number of estimator updates left out so far; on the last stage of all that have told."""
        return super().skipped | self._reporting.skipped

    # ---- state

    def drain(self) -> None:
        """Receive what is under way, without learning from it: it can then be saved."""
        self._inbox.drain()
        if self._late is not None:
            self._late.drain(self._updates)

    @property
    def waits_for_part(self) -> bool:
        """Whether a whole state was restored of which it is not known yet which part is this stage's."""
        return self._saved is not None

    def state_dict(self) -> dict[str, Any]:
        """This stage's part of what must survive a restart; the whole while it `waits_for_part`."""
        if self._saved is not None:
            return dict(self._saved)
        state = super().state_dict()
        state["pipeline"] = {
            "staleness": self._staleness,
            "updates": self._updates,
            "pending": {} if self._boundary is None else {self._boundary: save(self._inbox.pending)},
            "late": {} if self._late is None else {str(self._boundary): len(self._late)},
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a whole state, of a pipeline or of one process, once it is known which part is ours."""
        self._saved = state
        if self.is_placed:
            self._take_over(state)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(restrict(state, self.boundaries))
        twins = [] if self._readers.below is None else [self._readers.below]
        self._pool.keep([] if self._boundary is None else [self._boundary], twins)
        self._saved = None
        moved = state.get("pipeline")
        self._updates = self._steps - 1 if moved is None else moved["updates"]
        installed = None if self._boundary is None else self._pool.installed.get(self._boundary)
        if self._boundary is None or installed is None:
            self._inbox.restore([])
        else:
            pending = pending_of(state, self.boundaries, self._staleness, *self._copy)
            kept = pending.get(self._boundary, [])
            self._inbox.restore(load(self._boundary, installed, kept, self._device))
