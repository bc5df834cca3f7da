"""Run the user's step as one stage of a pipeline, on the user's own modules and code."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dni.core.boundary import named_submodules
from lightning_dni.errors import StageError
from lightning_dni.pipeline.bypass import Luggage
from lightning_dni.pipeline.calls import Calls, is_compiled, plain_call, usual_call
from lightning_dni.pipeline.placeholder import Below, Placeholder, ShapesOnly
from lightning_dni.pipeline.plan import StagePlan, named_tensors
from lightning_dni.pipeline.skipped import SkippedModule

T = TypeVar("T")


class StageDone(BaseException):
    """Ends the run of a stage whose output has been given away; no `except Exception` of the user sees it."""


class StageRunner:
    """One stage of a model that stays whole.

    While attached, `run` calls the user's step such that only the modules of `stage` compute. Outside of
    `run`, and on copies, the model behaves as always.

    Args:
        model: The model that was traced, or a copy.
        plan: What was seen.
        stage: Its number, from the input up.
        device: Where it computes; None: the CPU.

    Raises:
        StageError: There is no such stage.
    """

    def __init__(
        self, model: nn.Module, plan: StagePlan, stage: int, device: torch.device | None = None
    ) -> None:
        plan.check(stage)
        self._model, self._plan, self._stage = model, plan, stage
        self._lower = plan.boundaries[stage - 1] if stage else None
        self._upper = plan.boundaries[stage] if stage < plan.stages - 1 else None
        self._below = Below(stage, self._lower or "")
        self._below.device = device or self._below.device
        self._calls = Calls()
        self._luggage = Luggage(plan.bypasses, stage)
        self._run: _Run | None = None
        self._kept: list[tuple[nn.Module, str]] = []
        self._seen: frozenset[nn.Module] = frozenset()

    @property
    def stage(self) -> int:
        """Number of the stage."""
        return self._stage

    def attach(self) -> None:
        """Take over the calls of the modules of other stages; harmless where done already.

        Raises:
            StageError: Another runner has them.
        """
        if self._calls.placed:
            return
        try:
            self._place()
        except BaseException:
            self._calls.remove()
            raise

    def _place(self) -> None:
        modules = named_submodules(self._model)
        inside = tuple(f"{n}." for n, m in modules.items() if is_compiled(m) and not self._is_split(n))
        self._seen = frozenset(m for n, m in modules.items() if not n.startswith(inside))
        first = {module: name for name, module in reversed(modules.items())}
        named = first | {modules[name]: name for name in self._plan.boundaries}
        for module, name in named.items():
            on_call = self._replacement(name, first[module], module)
            if on_call is not None:
                self._calls.place(module, on_call)
        foreign = {
            n: t for n, t in named_tensors(self._model).items() if not self._plan.holds(self._stage, n)
        }
        self._below.foreign = frozenset(map(id, foreign.values()))
        parents = [(modules[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in foreign]
        self._kept = [(m, n) for m, n in parents if n in m._buffers]

    def _replacement(self, name: str, first: str, module: nn.Module) -> Callable[..., Any] | None:
        """What answers for `module` while attached; None where it does itself."""
        usual, stages = usual_call(module), self._plan.modules.get(name, frozenset())
        if name == self._lower:
            return partial(self._deliver, usual)
        if name == self._upper:
            return partial(self._give_away, usual, first)
        if stages and self._stage not in stages:
            if min(stages) < self._stage:
                skipped = SkippedModule(name, module, self._plan.calls.get(name, ()), self._below)
                return partial(self._skip, usual, module, first, skipped)
            return partial(self._stray, usual, name)
        plain = is_compiled(module) and self._is_split(name)
        if self._luggage and module in self._seen:
            return partial(self._note, plain_call(module) if plain else usual, first)
        return plain_call(module) if plain else None

    def _is_split(self, name: str) -> bool:
        return len(self._plan.modules.get(name, ())) > 1

    def detach(self) -> None:
        """Leave the model as it was; harmless where it is."""
        self._calls.remove()
        self._kept, self._below.foreign = [], frozenset()

    def __enter__(self) -> "StageRunner":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def run(
        self,
        step: Callable[[], T],
        receive: Callable[[], Any] | None = None,
        emit: Callable[[Any], None] | None = None,
        crossed: Sequence[Tensor] = (),
        arrived: Sequence[Tensor] = (),
    ) -> T | None:
        """Run `step` as this stage.

        Args:
            step: The user's step, on the whole batch.
            receive: Gives the output of the lower boundary's module, when it is asked for.
            emit: Takes the output of the upper boundary's module.
            crossed: The tensors of the lower boundary's output.
            arrived: What has come beside it.

        Returns:
            What `step` returned on the last stage, else None.

        Raises:
            StageError: Not attached, or the step did not run as it was traced.
            BoundaryError: The stage needs something from below other than what crosses the boundary.
        """
        self._check_ends(receive, emit)
        self._calls.check()
        run = _Run(receive, emit)
        self._luggage.begin(crossed, arrived)
        buffers = [(module, name, module._buffers[name]) for module, name in self._kept]
        self._run = run
        try:
            return self._call_step(step, run)
        finally:
            self._run, self._below.open = None, False
            run.shapes.close()
            self._luggage.end()
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    def onward(self) -> list[Tensor]:
        """What goes past the upper boundary beside its own output, in the run in progress.

        Raises:
            BoundaryError: Something of it was not made, or is from below.
        """
        tensors = self._luggage.onward()
        self._check_value(tensors, "what its modules return and later stages read")
        return tensors

    def _check_ends(self, receive: object, emit: object) -> None:
        if not self._calls.placed:
            raise StageError(
                f"Expected stage {self._stage} to be attached, but got a run before. Call `attach()` first."
            )
        if self._run is not None:
            raise StageError(
                f"Expected one run of stage {self._stage} at a time, but got one inside of another."
            )
        for name, end, boundary in (("receive", receive, self._lower), ("emit", emit, self._upper)):
            if (end is None) != (boundary is None):
                raise StageError(
                    f"Expected `{name}` to be {'None' if boundary is None else 'given'} on stage "
                    f"{self._stage} of {self._plan.stages}, but got {end!r}."
                )

    def _call_step(self, step: Callable[[], T], run: "_Run") -> T | None:
        self._below.refused = None
        if self._lower is not None:
            self._below.open = True
            run.mode = run.shapes.enter_context(ShapesOnly(self._below))
        value: T | None = None
        try:
            value = step()
        except StageDone:
            run.left = True
        except Exception as error:
            if self._below.refused is None or error is self._below.refused:
                raise
            raise self._below.refused from error
        if self._below.refused is not None:
            raise self._below.refused
        self._check_run(run)
        self._check_value(value, "the value that the step returned")
        return value

    def _check_run(self, run: "_Run") -> None:
        if self._lower is not None and not run.received:
            raise self._did_not_run(self._lower)
        if self._upper is not None and not run.emitted:
            raise self._did_not_run(self._upper)
        if run.emitted and not run.left:
            raise StageError(
                f"Expected the run of stage {self._stage} to end at boundary {self._upper!r}, but the step "
                "caught what ends it. Write `except Exception:` in place of a bare `except:`, and do not "
                "return from `finally`."
            )

    def _did_not_run(self, boundary: str) -> StageError:
        return StageError(
            f"Expected the step to run boundary {boundary!r} on stage {self._stage}, but it did not, "
            "though it did when the model was traced. Choose modules that run in every step, and compile "
            "modules rather than the step."
        )

    def _check_value(self, value: Any, what: str) -> None:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Placeholder) or (isinstance(leaf, Tensor) and leaf.is_meta):
                raise self._below.skip_connection(f"a tensor from below in {what}")

    def _deliver(self, usual: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None or run.receive is None:
            return usual(*args, **kwargs)
        if run.received:
            raise self._below.refuse(
                "a second run of that boundary in one step", "Choose a module that runs once in every step."
            )
        run.received, self._below.open = True, False
        run.leave_shapes()
        self._luggage.check()
        return run.receive()

    def _give_away(self, usual: Callable[..., Any], first: str, *args: Any, **kwargs: Any) -> Any:
        output = self._note(usual, first, *args, **kwargs)
        run = self._run
        if run is None or run.emit is None:
            return output
        self._check_value(output, f"the output of boundary {self._upper!r}")
        if not run.emitted:
            run.emitted = True
            run.emit(output)
        raise StageDone

    def _skip(
        self,
        usual: Callable[..., Any],
        module: nn.Module,
        name: str,
        skipped: SkippedModule,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = self._run
        if run is None:
            return usual(*args, **kwargs)
        if self._below.everything:
            return plain_call(module)(*args, **kwargs)
        return self._note(lambda *a, **k: skipped(a, k), name, *args, **kwargs)

    def _note(self, usual: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        # while torch.compile looks on it is inside a call that is noted
        if torch.compiler.is_compiling() or run is None or run.emitted or self._below.everything:
            return usual(*args, **kwargs)
        path = self._luggage.frames.enter(name)
        try:
            output = usual(*args, **kwargs)
        finally:
            self._luggage.frames.leave()
        if self._below.open:
            return self._luggage.fill(path, output)
        self._luggage.note(path, output)
        return output

    def _stray(self, usual: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return usual(*args, **kwargs)
        raise StageError(
            f"Expected module {name!r} to run on stage {min(self._plan.modules[name])}, but it ran on stage "
            f"{self._stage}: it did otherwise, or not at all, when the model was traced. Trace a step that "
            "runs everything, or choose boundaries between which it always runs."
        )


class _Run:
    """What has happened in one run."""

    def __init__(self, receive: Callable[[], Any] | None, emit: Callable[[Any], None] | None) -> None:
        self.receive, self.emit = receive, emit
        self.received = self.emitted = self.left = False
        self.shapes = ExitStack()
        self.mode: ShapesOnly | None = None

    def leave_shapes(self) -> None:
        """Take the mode off at once, unless the user has entered another one above it."""
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if stack and stack[-1] is self.mode:
            self.shapes.close()
