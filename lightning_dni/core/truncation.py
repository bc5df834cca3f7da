"""Synthetic gradients where backprop through time is truncated (Jaderberg et al. 2017, section 3.1).

A recurrent module reads a chunk of a sequence at a time. The state that it hands on from chunk to chunk is
cut; at the end of a chunk the estimator says what gradient the losses of the future have there, and the chunk
is differentiated against its own loss and that. What then comes back to the state at its beginning, synthetic
gradient included (it is bootstrapped), is the target for what was said at the end of the chunk before. Nobody
says that a sequence goes on: a row does where the state comes in as it went out, to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.bootstrap import Bootstrap, Install
from lightning_dni.core.boundary import named_submodules
from lightning_dni.core.carry import (
    StateValue,
    Truncations,
    choose_damping,
    find_batch_dim,
    keep_rows,
    refuse_numbers,
    resolve_truncations,
    returned_state,
    state_argument,
)
from lightning_dni.core.chunk import (
    Call,
    Chunk,
    Ending,
    as_applied,
    mark,
    refuse_above,
    refuse_other_backward,
    sum_arrived,
    walk,
    with_gradients,
    with_own_nodes,
)
from lightning_dni.core.context import check_context
from lightning_dni.core.continuity import Continuity
from lightning_dni.core.cut import Lesson
from lightning_dni.core.estimator import Installed, Record, Signal, who
from lightning_dni.core.settings import StepSettings
from lightning_dni.core.synthesis import check_shapes, check_zero, estimating, observed
from lightning_dni.core.tap import Taps
from lightning_dni.errors import BoundaryError, EstimatorError


class RecurrentCuts:
    """The chunks of one engine's recurrent modules.

    Args:
        model: The user's module.
        truncations: Names or patterns of its recurrent submodules; or {pattern: batch dimension}.
        damping: What synthetic gradients are multiplied with before they are used; or {pattern: value}.
        install: Gives the estimator of a truncation, building it from its first state.
        bootstrap: Has the estimators learn.

    Raises:
        BoundaryError: A pattern matches no submodule, or the module cannot be cut.
        EstimatorError: A damping factor is outside (0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        truncations: Truncations | None,
        damping: float | Mapping[str, float],
        install: Install,
        bootstrap: Bootstrap,
    ) -> None:
        self._model, self._install, self.bootstrap = model, install, bootstrap
        self._dims = resolve_truncations(model, truncations)
        self.damping = choose_damping(self._dims, damping)
        self._modules: dict[str, nn.Module] = {}
        self._held: dict[str, list[Ending]] = {}
        self._numbers, self._continuity = count(), Continuity()
        self.reset()

    def attach(self, taps: Taps, runs_forward: Callable[[], bool]) -> None:
        """Hook every recurrent module; the hooks are dead but where `runs_forward`."""
        modules = named_submodules(self._model) if self._dims else {}
        self._modules = {name: modules[name] for name in self._dims}
        for name, module in self._modules.items():
            enter, leave = partial(self._enter, runs_forward, name), partial(self._leave, runs_forward, name)
            taps.attach_states(module, state_argument(module), enter, leave)

    def begin_step(self) -> None:
        """Forget a step that has not ended, and the reports of the last one."""
        self.reset()
        self.bootstrap.begin_step()

    def reset(self) -> None:
        """Forget the step in progress, but not what the sequences go on from."""
        for ending in (ending for endings in self._held.values() for ending in endings):
            ending.forget_step()
        self._calls: dict[int, tuple[Chunk, Call]] = {}
        self._entering: dict[str, Chunk] = {}
        self._closing: list[Chunk] = []
        self._untrained: set[str] = set()
        self._differentiating = False

    @property
    def names(self) -> tuple[str, ...]:
        """The truncations by name."""
        return tuple(self._dims)

    # ---- on the way up

    def _enter(self, runs_forward: Callable[[], bool], name: str, state: Any) -> Any:
        return self.enter(name, state) if self._differentiating or runs_forward() else state

    def _leave(self, runs_forward: Callable[[], bool], name: str, output: Any) -> Any:
        return self.leave(name, output) if runs_forward() else None

    def enter(self, name: str, state: Any) -> Any:
        """What the module `name` shall read instead of `state`, so that no gradient gets past a chunk."""
        value = StateValue(name, state)
        if self._differentiating:  # an activation checkpoint runs again what it has run before
            return self._enter_again(name, value, state)
        self._entering[name] = Chunk(name)
        if not value.tensors:
            refuse_numbers(name, state)
            return state
        dim = find_batch_dim(name, self._modules[name], value.tensors, self._dims[name])
        numbers = set(walk(value.tensors, through=False))
        here = [self._calls[n] for n in numbers if n in self._calls]
        own = [(chunk, call) for chunk, call in here if chunk.truncation == name]
        if own:
            for _, call in own:
                call.continued = True
            chunk = max(own, key=lambda found: found[1].number)[0]
            chunk.merge(other for other, _ in own)
            self._entering[name] = chunk
            return state
        old = any(n is not None and n not in self._calls for n in numbers)
        if old and (here or None in numbers):
            raise BoundaryError(
                f"Expected the state that comes into truncation {name!r} to be detached where parameters "
                "take part in it, but got one with the graph of an earlier step: their gradient would be "
                "lost with it. Detach the state that is kept from one step to the next."
            )
        entered = [_cut(tensor, keep=not old) for tensor in value.tensors]
        chunk = Chunk(name, entered, dim)
        chunk.before, chunk.rows = self._find_before(name, entered)
        self._entering[name] = chunk
        return value.replaced(entered)

    def _enter_again(self, name: str, value: StateValue, state: Any) -> Any:
        """What `enter` gave, in what a checkpoint has to save of it."""
        if all(t.requires_grad for t in value.tensors):
            return state
        here = [self._calls[n][0] for n in walk(value.tensors, through=False) if n in self._calls]
        goes_on = any(chunk.truncation == name for chunk in here)
        return state if goes_on else value.replaced([_cut(t, keep=True) for t in value.tensors])

    def _find_before(self, name: str, entered: Sequence[Tensor]) -> tuple[Ending | None, Tensor | None]:
        """The end of a chunk from which these sequences go on, and which of them do."""
        calls = [call for chunk, call in self._calls.values() if chunk.truncation == name]
        here = [call.ending for call in calls if not call.continued]
        shapes = [t.shape for t in entered]
        fitting = [e for e in [*self._held.get(name, ()), *here] if [v.shape for v in e.values] == shapes]
        if not fitting:
            return None, None
        rows = [ending.continues_in(entered) for ending in fitting]
        best = 0
        if len(fitting) > 1:  # waits for an accelerator
            best = max(range(len(rows)), key=lambda k: (int(rows[k].sum()), not fitting[k].taken, k))
        fitting[best].taken = True
        self._continuity.see(name, rows[best], entered, fitting[best].batch_dim)
        return fitting[best], rows[best]

    def leave(self, name: str, output: Any) -> Any:
        """Take note of what the module `name` returns."""
        chunk = self._entering.pop(name, None)
        if chunk is None:
            return None
        module, output = self._modules[name], with_own_nodes(output)
        value = StateValue(name, returned_state(name, module, output))
        if not any(t.requires_grad for t in value.tensors):
            self._untrained.add(name)
            return None
        dim = find_batch_dim(name, module, value.tensors, self._dims[name])
        kept = [t.clone() for t in value.tensors]  # the user may change them in place, or detach them so
        ending = Ending([t.detach() for t in kept], dim, chunk=chunk)
        call = Call(next(self._numbers), kept, ending, value.replaced(ending.values))
        mark((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), call.number)
        for each in (chunk, *chunk.merged):
            each.calls.append(call)
        chunk.batch_dim = dim
        self._calls[call.number] = (chunk, call)
        return output

    def refuse_boundary(self, boundary: str, output: Any) -> None:
        """Refuse a boundary in a recurrent module or above it; see `refuse_above`."""
        if self._dims:
            refuse_above(boundary, output, {boundary} & self._dims.keys(), self._entering, self._calls)

    # ---- on the way down

    def prepare(self, loss: Tensor, settings: StepSettings, elements_per_row: int | None) -> Tensor:
        """`loss` with the synthetic gradients at the ends of the chunks that it comes back through.

        Raises:
            BoundaryError: It comes back through a chunk a second time, or a truncation did not run.
            EstimatorError: An estimator cannot be asked, or gives something unusable.
        """
        if not self._dims:
            return loss
        self._refuse_absent(settings)
        self._closing = self._counted(loss)
        gradients: list[Tensor] = []
        states: list[Tensor] = []
        for chunk in self._closing:
            chunk.closed = True
            for call in (call for call in chunk.ends if call.ending.chunk is chunk):
                said = self._synthesize(chunk, call, settings, elements_per_row)
                pairs = [(g, s) for g, s in zip(said, call.left, strict=False) if s.requires_grad]
                gradients += [g for g, _ in pairs]
                states += [s for _, s in pairs]
        self._differentiating = True
        return with_gradients(loss, gradients, states)

    def _refuse_absent(self, settings: StepSettings) -> None:
        ran = {chunk.truncation for chunk, _ in self._calls.values()}
        absent = [name for name in self._dims if name not in ran]
        if absent and self._untrained.issuperset(absent) and settings.own_parameters is None:
            raise BoundaryError(
                f"Expected the states of truncations to need a gradient, but nothing that makes those of "
                f"{absent} is trained (parameters, inputs and first state are frozen), or the module "
                "detaches them itself. Unfreeze what shall learn and return the state as it is, which is cut "
                "in any case; or leave the module out of `truncations`."
            )
        if absent and settings.own_parameters is None:
            raise BoundaryError(
                f"Expected every truncation to run in the forward pass that reached the loss, but {absent} "
                f"did not (ran: {sorted(ran)}). Call the module itself, not its `forward`, with gradients "
                "enabled; or leave it out of `truncations`. Where torch.compile had compiled what contains "
                "it before the engine was attached, call torch.compiler.reset() once the engine is attached."
            )

    def _counted(self, loss: Tensor) -> list[Chunk]:
        """The chunks that `loss` comes back through, and those of this step that they go on from."""
        numbers = set(walk([loss], through=True)) if self._calls else set()
        queue = [self._calls[n][0] for n in numbers if n in self._calls]
        for chunk in queue:
            if chunk.closed:
                raise BoundaryError(
                    f"Expected one backward pass through each chunk of truncation {chunk.truncation!r}, but "
                    "a second loss comes back through one. Add the losses up, or detach the state in between."
                )
        found: list[Chunk] = []
        while queue:
            chunk = queue.pop()
            if chunk not in found and not chunk.closed:
                found.append(chunk)
                queue += [b.chunk for b in [chunk.before] if b is not None and b.chunk is not None]
        return sorted(found, key=lambda chunk: chunk.calls[0].number)

    def _synthesize(
        self, chunk: Chunk, call: Call, settings: StepSettings, elements_per_row: int | None
    ) -> list[Tensor]:
        """Ask what the future's gradient is at the end of `chunk`; nothing for exactly zero."""
        name, h = chunk.truncation, call.ending.rows()
        installed = self._install(name, h)
        _refuse_estimator(installed, name)
        said_by, estimator = who(installed.estimator, name), installed.estimator
        expected = estimator.num_classes, estimator.context_size, estimator.ignore_index, len(h[0])
        context = check_context(settings.context, *expected, said_by, settings.check_values)
        before = chunk.before.record.state if chunk.before and chunk.before.record else None
        with estimating(installed, h[0], grad=False):
            gradient, state = estimator.synthesize(h, context, keep_rows(before, chunk.rows))
        if gradient is not None:
            check_shapes(gradient, h, said_by)
            if settings.loss_denominator == "elements" and elements_per_row is None:
                check_zero(gradient, said_by)
            sound = self.bootstrap.is_sound(observed(gradient), "gradient", name, installed, settings)
            gradient = gradient if sound else None
        kept = context if context is None else context.clone()  # the next batch may be written over it
        call.ending.record = Record(h, kept, gradient, state)
        if gradient is None:
            return []
        share = settings.share(h, call.state, elements_per_row) * self.damping[name]
        return as_applied(gradient, call.left, call.ending.batch_dim, share)

    def finish(self, settings: StepSettings, elements_per_row: int | None, number: int) -> list[Lesson]:
        """Have the estimators learn from what the differentiated loss has left at the chunks' beginnings.

        Args:
            settings: What holds for the step.
            elements_per_row: Elements of the network's output per row, if one was seen.
            number: The engine's number of the step.

        Returns:
            What to learn from again.
        """
        lessons = [self._teach(chunk, settings, elements_per_row) for chunk in self._closing]
        if settings.own_parameters is None:
            lessons += self.end_sequences(settings)
        if settings.report and settings.exchange is not None:
            going_on = [chunk for chunk in self._closing if self._held.get(chunk.truncation)]
            self.bootstrap.report_everywhere(going_on, self._install)
        self._closing, self._differentiating = [], False
        self.bootstrap.watch(number)
        return [lesson for lesson in lessons if lesson is not None]

    def _teach(self, chunk: Chunk, settings: StepSettings, elements_per_row: int | None) -> Lesson | None:
        before = chunk.before
        together = [c for c in self._closing if c is chunk or (c.before is before and before is not None)]
        arrived, rows = sum_arrived(together) if chunk is together[0] else ((), None)
        if before is None or rows is None or before.record is None:
            return None
        before.learned = True
        name, record = chunk.truncation, before.record
        end = chunk.ends[0]
        factor = settings.factor(arrived, end.state, elements_per_row)
        target = tuple(g / factor for g in arrived)
        future = None if end.ending.record is None else end.ending.record.gradient
        installed = self._install(name, record.h)
        return self.bootstrap.teach(name, installed, record, target, rows, future, settings)

    def end_sequences(self, settings: StepSettings) -> list[Lesson | None]:
        """Teach that nobody goes on from what earlier steps have left, where this step has begun anew.

        Raises:
            StageError: A loss was differentiated without the engine's knowledge.
        """
        refuse_other_backward(chunk for chunk, _ in self._calls.values())
        if self.bootstrap.sequence_end == "ignore":
            return []
        lessons: list[Lesson | None] = []
        begun = {chunk.truncation for chunk, _ in self._calls.values() if chunk.closed}
        for name in (name for name in self._dims if name in begun):
            for ending in self._held.get(name, ()):
                record = ending.record
                if ending.learned or ending.passed or record is None:
                    continue
                ending.learned = True
                target = tuple(torch.zeros_like(h) for h in record.h)
                rows = torch.zeros(len(target[0]), dtype=torch.bool, device=target[0].device)
                installed = self._install(name, record.h)
                lessons.append(self.bootstrap.teach(name, installed, record, target, rows, None, settings))
        return lessons

    # ---- from step to step

    def end_step(self) -> None:
        """Keep the ends of this step's chunks for the next, and let go of its graphs."""
        ended: dict[str, list[Ending]] = {}
        for chunk, call in self._calls.values():
            if call.ending.record is not None and not call.continued:
                ended.setdefault(chunk.truncation, []).append(call.ending)
        self._continuity.end_step({**ended, **dict.fromkeys(self._untrained)})
        waiting = {name: ended.get(name, self._held.get(name, [])) for name in self._dims}
        self._held = {name: [e for e in endings if not e.learned] for name, endings in waiting.items()}
        self.reset()

    def state_dict(self) -> dict[str, Any]:
        """What the sequences go on from, in tensors and primitives."""
        return {name: [ending.state_dict() for ending in endings] for name, endings in self._held.items()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore `state_dict`."""
        self._held = {
            name: [Ending.from_state_dict(each, device) for each in state.get(name, ())]
            for name in self._dims
        }


def _cut(tensor: Tensor, keep: bool) -> Tensor:
    """A state tensor that keeps the gradient that comes to it; with its graph, where that is to `keep`."""
    if not tensor.requires_grad or not keep:
        return tensor.detach().requires_grad_()
    passed = tensor.view_as(tensor)
    passed.retain_grad()
    return passed


def _refuse_estimator(installed: Installed, name: str) -> None:
    estimator = installed.estimator
    needs = sorted(signal.value for signal in estimator.needs - {Signal.TARGET})
    waits = bool(estimator.locks or estimator.delay)
    if needs or waits or (installed.parameters and not estimator.needs):
        why = f"needs {needs}" if needs else "waits for it" if waits else "never hears of it"
        raise EstimatorError(
            f"Expected an estimator that learns from the target gradient alone at truncation {name!r}, but "
            f"{type(estimator).__name__} {why}: the next chunk is not there yet. Use LinearEstimator, "
            "MLPEstimator or RecurrentEstimator."
        )
