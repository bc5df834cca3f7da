"""DNIEngine: training with synthetic gradients in one process, for Lightning and for plain torch loops.

One training step is told in `core/step.py`.

Example: a plain torch loop.

>>> import torch
>>> from torch import nn
>>> from lightning_dni.core import DNIEngine
>>> from lightning_dni.estimators import LinearEstimator
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(256, 20)
>>> y = (x[:, :10].sum(1) > 0).long()
>>> model = nn.Sequential(
...     nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
... )
>>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
>>> engine = DNIEngine(model, ["1", "3"], lambda spec: LinearEstimator(spec, num_classes=2))
>>> with engine:  # hooks are on the model inside this block only
...     for _ in range(200):
...         optimizer.zero_grad()
...         with engine.training_step((x, y)):
...             loss = nn.functional.cross_entropy(model(x), y)
...         engine.backward(loss)
...         optimizer.step()
...         engine.update_estimators()
>>> (model(x).argmax(1) == y).float().mean().item() > 0.95
True
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dni.core.base import Engine
from lightning_dni.core.bootstrap import Bootstrap
from lightning_dni.core.boundary import LAST_STAGE, device_of, named_submodules
from lightning_dni.core.consumer import Hybrid, Layer, linear_layers
from lightning_dni.core.cut import Cut, refuse_other_backward, refuse_unseen
from lightning_dni.core.delays import Delays, refuse_beside_delay
from lightning_dni.core.estimator import Installed, Signal, who
from lightning_dni.core.immediate import ImmediateUpdates, expect_updater, refuse_tied
from lightning_dni.core.owners import Past
from lightning_dni.core.randomness import derive_seed, reseed, seeded
from lightning_dni.core.report import report_step
from lightning_dni.core.rerun import refuse_rerun
from lightning_dni.core.settings import Scale, StepSettings
from lightning_dni.core.sparse import draw_asleep
from lightning_dni.core.stage import in_place_errors
from lightning_dni.core.step import Step
from lightning_dni.core.tap import Taps, one_graph_errors
from lightning_dni.core.truncation import RecurrentCuts
from lightning_dni.errors import StageError


class DNIEngine(Engine):
    """Cuts a model at named boundaries and trains the stages on synthetic gradients.

    Args:
        model: Any module; it is hooked while the engine is attached and never edited.
        boundaries: Submodule names or fnmatch patterns, in any order.
        estimator: Called once per boundary with its `BoundarySpec` when its first activation
            arrives; or {pattern: factory}.
        labels: Where the context is in the batch: "auto", an index, a key, a callable, or None.
        output: Name of the submodule whose output is the network's output; None: `model` itself.
        estimator_optimizer: Makes the estimators' optimizer from parameters; or {pattern: factory}.
        estimator_steps: Steps that the estimators take per step of the user's optimizer.
        estimator_scheduler: Makes a learning-rate scheduler from the estimators' optimizer, one step of which
            follows each update.
        estimator_clip_norm: Norm to which the gradients of each estimator are clipped.
        bp_lambda: Lambda of BP(lambda), 0 (synthetic only) to 1 (backprop); or {pattern: value}.
        update_probability: Probability, above 0 and up to 1, with which the stage below a boundary runs its
            backward pass and updates in a step; or {pattern: value}. The last stage is "(last stage)" there.
        update: "step" leaves gradients to the user's optimizer step; "immediate" has `updater` step a stage
            as soon as its gradient is there, in the forward pass. The numbers are the same.
        loss_denominator: What the user's loss is divided by: "batch" (mean over rows), "sum",
            "elements" (mean over rows and output elements), or a callable of batch and h.
        rng: "global" leaves the model's randomness alone; "stage" gives each stage's forward a stream
            derived from (seed, boundary below, step).
        on_nonfinite: "raise" stops at a loss, a synthetic gradient or a target that is not finite; "skip"
            leaves it out of the update of the estimator, and of a stage that was given such a gradient.
        seed: Seed of the engine's own streams; None: torch's initial seed.
        exchange: Averages gradients over replicas, which need one `seed`; None: there are no others.
        rank: Number of this replica, which has its own streams under `rng="stage"`.
        synthetic_inputs: Called once per boundary with its spec, whose `input` is the network's: makes what
            predicts, in training steps, the activation that the stage above goes on from; or {pattern:
            factory, or None for the real one}. None: every stage goes on from the real one.
        network_input: Where that input is in the batch: "auto", an index, a key, or a callable.
        input_optimizer: Makes the optimizer of what predicts inputs, as `estimator_optimizer` does.
        truncations: Names or patterns of recurrent submodules above all boundaries, called as
            `module(input, state)`, at whose state backprop through time is truncated; or {pattern: the
            dimension of the state that counts rows}.
        damping: What synthetic gradients at truncations are multiplied with; or {pattern: value}.
        sequence_end: What is taught at a truncation about rows that do not go on: "zero", that nothing comes
            back to them (an episode has ended); or "ignore", nothing (a sequence was cut off).

    Raises:
        BoundaryError: A boundary or pattern names no submodule.
        EstimatorError: An option is out of its range.
        StageError: On `update="immediate"` or `synthetic_inputs`, where there is an `exchange`.

    Attributes:
        updater: Takes immediate updates: `SplitOptimizer(optimizer)`, set before the first training step. The
            user's `optimizer.step()` follows as ever, and takes what is left.
    """

    def _reset(self) -> None:
        self._taps, self._delays = Taps(), Delays()
        self._step: Step | None = None
        self._in_forward = False
        self._held: Past = {}
        self._named: dict[str, nn.Parameter] = {}
        self._hybrid = Hybrid()
        self._chunks = RecurrentCuts(
            self._model,
            self._truncations,
            self._damping,
            self._pool.install,
            Bootstrap(self._health, self._sequence_end),
        )

    # ---- hooks

    def attach(self) -> None:
        """Hook the model. Outside a training step the hooks do nothing.

        Raises:
            StageError: The engine is attached already, or another one is; or stages share parameters that are
                updated immediately.
        """
        if self._update == "immediate":
            modules = named_submodules(self._model)
            refuse_tied(self._model, {name: modules[name] for name in self._modules})
        # by name, since a module may have been replaced since the engine was made
        boundaries = {name: partial(self._on_boundary, name) for name in self._modules}
        self._taps.attach(self._model, boundaries, self._output_name, self._on_output, self._on_again)
        self._chunks.attach(self._taps, self._runs_forward)
        if self._pool.may_need(Signal.CONSUMER):
            self._watch_layers()
        self._device = device_of(self._model)
        self._named = dict(self._model.named_parameters())

    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""
        self._taps.remove()
        self._chunks.reset()
        self._step, self._in_forward = None, False

    def __enter__(self) -> "DNIEngine":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _on_boundary(self, name: str, output: Any) -> Any:
        if self._step is None or not self._runs_forward():
            self._on_again(name)
            return None
        self._chunks.refuse_boundary(name, output)
        passed_on = self._step.cut(name, output)
        if not self._taps.watches_layers and self._pool.installed_needs(name, Signal.CONSUMER):
            self._watch_layers()  # it was made by a function
        if self._rng == "stage":
            reseed(self._stage_seed(name, self._step.fired[name]), self._device)
        return passed_on

    def _on_again(self, name: str) -> None:
        if self._step is not None:
            refuse_rerun(name, self._step.cuts, self._step.settings.updates, self._rng == "stage")

    def _stage_seed(self, boundary: str | None, call: int) -> int:
        return derive_seed(self._pool.seed, "stage", boundary, call, self._steps, *self._replica)

    def _runs_forward(self) -> bool:
        # in manual optimization a backward pass may run a checkpoint's region again in here
        in_backward = torch._C._current_graph_task_id() != -1
        return self._in_forward and torch.is_grad_enabled() and not in_backward

    def _on_output(self, output: Any) -> None:
        if self._step is not None and self._runs_forward():
            self._step.see_output(output)

    def _watch_layers(self) -> None:
        self._taps.attach_layers(linear_layers(self._model), self._on_layer_input, self._on_layer_output)

    def _on_layer_input(self, name: str, layer: Layer, x: Tensor) -> Tensor | None:
        # in a backward pass too: a checkpoint runs again what it has run before
        return None if self._step is None else self._step.read(name, layer, x, self._in_forward)

    def _on_layer_output(self, name: str, layer: Layer, output: Tensor) -> Tensor | None:
        return None if self._step is None else self._step.consumers.leave(name, layer, output)

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
        """The block in which a training forward pass is cut.

        Args:
            batch: The user's batch; the context is found in it as `labels` says.
            accumulate: Number of forward passes whose losses the user averages.
            scale: What a gradient scaler will multiply the loss with, or a callable that gives it.
            several_losses: Whether the block holds any number of backward passes (or none), each through a
                forward pass of its own, which need not run every boundary.
            first: Whether it is the first of them, at which gradients are zeroed (for replicas), and what
                sits out until the update is drawn.
            last: Whether it is the last of them, at which replicas exchange gradients, and stages step
                immediately.

        Raises:
            StageError: The engine is not attached, or `updater` is not set.
            BoundaryError: A boundary is changed in place, or compiled with fullgraph=True.
        """
        if not self._taps.installed:
            raise StageError(
                "Expected the engine to be attached, but the model has no hook of it. Write `with engine:` "
                "around the training loop, or call `engine.attach()`."
            )
        refuse_unseen(self._step)
        if first or self._asleep is None:  # it goes on in the midst of an accumulated batch
            self._asleep = draw_asleep(self._update_probability, self._pool.seed, self._steps)
        self._immediate = self._immediate_updates(accumulate, several_losses, last)
        settings = self._settings(batch, accumulate, scale, several_losses, last)
        if self._inputs is not None:
            self._inputs.begin(batch, several_losses)
        self._step = Step(settings, partial(self._install, settings), self.profile, self._held)
        if settings.exchange is not None:
            settings.exchange.begin(fresh=first and not several_losses)
        self._chunks.begin_step()
        self._in_forward, self._report, self._requested, self._instruments = True, None, "nothing", []
        staged = seeded(self._stage_seed(None, 0), self._device) if self._rng == "stage" else nullcontext()
        try:
            with staged, one_graph_errors(self.boundaries), in_place_errors(self._step.fired):
                yield
            if several_losses:
                self._end_losses(self._step.cuts, settings)
            self._elements_per_row = self._step.elements_per_row
            self._steps += 1  # a step that failed will be taken again
        finally:
            self._in_forward, self._held = False, self._step.held()
            if self._inputs is not None:
                self._inputs.end()
            if several_losses:
                self._end_step()

    def _end_losses(self, cuts: Sequence[Cut], settings: StepSettings) -> None:
        refuse_other_backward(cuts)
        lessons = self._chunks.end_sequences(settings)
        self._pool.remember([lesson for lesson in lessons if lesson is not None])
        if settings.exchange is not None and self._chunks.names:
            settings.exchange.average(list(self._pool.named_parameters().values()))

    def _end_step(self) -> None:
        self._step = None
        self._chunks.end_step()

    def _immediate_updates(
        self, accumulate: int, several_losses: bool, last: bool
    ) -> ImmediateUpdates | None:
        if self._update != "immediate":
            return None
        updater = expect_updater(self.updater, several_losses, last and self._requested != "probe")
        if updater is None:
            return None
        judges = self._health.skips or self._checks_values
        return ImmediateUpdates(updater, self._named, self._bp_lambda, accumulate > 1, judges)

    def backward(self, loss: Tensor) -> None:
        """Differentiate `loss` through the last stage and merge every gradient that counts.

        Raises:
            StageError: No training step precedes.
            BoundaryError: A boundary did not run, or a path leaks around one.
            EstimatorError: An estimator was never told the network's output.
        """
        loss = self.prepare_backward(loss)
        if self.differentiates_loss:
            loss.backward()  # type: ignore[no-untyped-call]
        self.finish_backward()

    @property
    @override
    def differentiates_loss(self) -> bool:
        """Whether the loss of this step is to be differentiated, or the last stage sits the step out."""
        return self._step is None or LAST_STAGE not in self._step.settings.asleep

    def prepare_backward(self, loss: Tensor) -> Tensor:
        """First third of `backward`, for whoever differentiates the loss: check the way down.

        Returns:
            The loss that is to be differentiated, of the same value; at truncations it brings the
            synthetic gradients in.
        """
        if self._step is None:
            raise StageError(
                "Expected a training step before backward, but got none. Run the forward pass inside "
                "`with engine.training_step(batch):`."
            )
        self._step.prepare(loss)
        return self._chunks.prepare(loss, self._step.settings, self._step.elements_per_row)

    def finish_backward(self) -> None:
        """Last third of `backward`: settle what came back and merge it into `.grad`."""
        assert self._step is not None
        step = self._step
        try:
            self._finish(step)
        finally:
            if not self._in_forward:  # else the forward pass of another loss may follow
                self._end_step()

    def _finish(self, step: Step) -> None:
        cuts, number = step.finish(), self._steps - (not self._in_forward)
        self._hybrid.add(step.consumers.exact)
        lessons = self._chunks.finish(step.settings, step.elements_per_row, number)
        self._examine(step, cuts, number)
        self._delays.swap(cuts, self._named.values(), step.settings.accumulate)
        if step.settings.report:
            made = report_step(number, step, cuts, self._model, self._report, self.profile)
            self._report = replace(made, boundaries={**made.boundaries, **self._chunks.bootstrap.reports})
        lessons += step.merge(cuts, lambda: self._named | self._pool.named_parameters())
        if self._inputs is not None:
            self._inputs.remember()
        self._pool.remember(lessons)
        if self._in_forward and step.settings.exchange is not None:
            step.settings.exchange.begin(fresh=False)

    def _install(self, settings: StepSettings, name: str, outputs: Sequence[Tensor]) -> Installed:
        """The estimator of boundary `name`, which may have to say that it does not go with the rest."""
        installed = self._pool.install(name, outputs)
        if installed.estimator.delay:
            beside = {
                "several losses or optimizers": settings.own_parameters is not None,
                "a gradient scaler": settings.scale is not None,
                "other replicas": self._exchange is not None,
                "update_probability below 1": any(p < 1 for p in self._update_probability.values()),
            }
            refuse_beside_delay(who(installed.estimator, name), beside)
        return installed

    @override
    def update_estimators(self) -> None:
        refuse_unseen(self._step)
        super().update_estimators()
        self._delays.advance()

    @override
    def drop_estimator_gradients(self) -> None:
        super().drop_estimator_gradients()
        self._delays.advance()

    def describe(self) -> dict[str, object]:
        """The configuration in primitives; under feedback alignment with what makes it a hybrid."""
        facts = super().describe()
        if self._chunks.names:
            facts |= {"truncations": list(self._chunks.names), "damping": dict(self._chunks.damping)}
            facts["sequence_end"] = self._sequence_end
        if self._pool.may_need(Signal.CONSUMER):
            facts["feedback_alignment"] = self._hybrid.describe()
        return facts

    def _examine(self, step: Step, cuts: Sequence[Cut], number: int) -> None:
        scaled = step.settings.scale is not None
        if scaled or self._health.skips:
            self._health.sift(cuts, keep_stage=scaled)
        if not scaled:
            self._health.observe(number, step.loss, cuts)
        if self._exchange is None and (step.settings.check_values or self._health.is_crowded):
            self._health.look(at_once=step.settings.check_values and not scaled)

    # ---- state

    @override
    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart, in tensors and primitives."""
        own = {"delayed": self._delays.state_dict(self._model), "truncations": self._chunks.state_dict()}
        return super().state_dict() | {name: found for name, found in own.items() if found}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; see `Engine.load_state_dict`."""
        super().load_state_dict(state)
        self._delays.load_state_dict(state.get("delayed", []), self._model)
        self._chunks.load_state_dict(state.get("truncations", {}), self._device)
