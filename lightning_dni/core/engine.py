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
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dni.core.boundary import device_of, named_submodules, resolve_boundaries, resolve_output
from lightning_dni.core.context import Labels, find_context
from lightning_dni.core.cut import Cut, refuse_other_backward
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.health import Health, OnNonfinite
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory, EstimatorPool
from lightning_dni.core.randomness import derive_seed, seeded
from lightning_dni.core.report import StepReport, report_step
from lightning_dni.core.settings import Scale, StepSettings
from lightning_dni.core.stage import in_place_errors
from lightning_dni.core.step import Past, Profile, Step, no_profile
from lightning_dni.core.tap import Taps, one_graph_errors
from lightning_dni.core.target import Denominator, check_denominator, choose_lambdas
from lightning_dni.errors import EstimatorError, StageError


class DNIEngine:
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
        loss_denominator: What the user's loss is divided by: "batch" (mean over rows), "sum",
            "elements" (mean over rows and output elements), or a callable of batch and h.
        rng: "global" leaves the model's randomness alone; "stage" gives each stage's forward a stream
            derived from (seed, boundary below, step).
        on_nonfinite: "raise" stops at a loss, a synthetic gradient or a target that is not finite; "skip"
            leaves it out of the update of the estimator, and of a stage that was given such a gradient.
        seed: Seed of the engine's own streams; None: torch's initial seed.
        exchange: Averages gradients over replicas, which need one `seed`; None: there are no others.
        rank: Number of this replica, which has its own streams under `rng="stage"`.

    Raises:
        BoundaryError: A boundary or pattern names no submodule.
        EstimatorError: An option is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        boundaries: Sequence[str],
        estimator: EstimatorFactory | Mapping[str, EstimatorFactory],
        *,
        labels: Labels = "auto",
        output: str | None = None,
        estimator_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        estimator_steps: int = 1,
        estimator_scheduler: ScheduleFactory | None = None,
        estimator_clip_norm: float | None = None,
        bp_lambda: float | Mapping[str, float] = 0.0,
        loss_denominator: Denominator = "batch",
        rng: Literal["global", "stage"] = "global",
        on_nonfinite: OnNonfinite = "raise",
        seed: int | None = None,
        exchange: Exchange | None = None,
        rank: int = 0,
    ) -> None:
        check_denominator(loss_denominator)
        if rng not in ("global", "stage"):
            raise EstimatorError(f"Expected `rng` to be 'global' or 'stage', but got {rng!r}.")
        self._model = model
        self._modules = resolve_boundaries(model, boundaries)
        self._output = output
        resolve_output(model, output)
        self._labels, self._loss_denominator, self._rng = labels, loss_denominator, rng
        self._health = Health(on_nonfinite, self._modules)
        self._exchange, self._replica = exchange, (rank,) if rank else ()
        self._named: dict[str, nn.Parameter] = {}
        self._bp_lambda = choose_lambdas(self._modules, bp_lambda)
        self._pool = EstimatorPool(
            tuple(self._modules),
            estimator,
            estimator_optimizer or partial(torch.optim.Adam, lr=1e-3, fused=True),
            estimator_steps,
            torch.initial_seed() if seed is None else seed,
            estimator_scheduler,
            estimator_clip_norm,
        )
        self.profile: Profile = no_profile
        self._device = device_of(model)
        self._taps = Taps()
        self._step: Step | None = None
        self._in_forward = False
        self._held: Past = {}
        self._elements_per_row: int | None = None
        self._steps = 0
        self._requested: Literal["nothing", "report", "probe"] = "nothing"
        self._report: StepReport | None = None

    # ---- what others may see

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Names of the boundaries, in the order in which the model registers them."""
        return tuple(self._modules)

    @property
    def estimators(self) -> dict[str, GradientEstimator]:
        """The estimators built so far, by boundary."""
        return {name: installed.estimator for name, installed in self._pool.installed.items()}

    @property
    def bp_lambda(self) -> dict[str, float]:
        """The lambda of BP(lambda) at each boundary."""
        return dict(self._bp_lambda)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of estimator updates so far that left out something that was not finite, by boundary."""
        return dict(self._health.skipped)

    def set_bp_lambda(self, value: float | Mapping[str, float]) -> None:
        """Change lambda from the next training step on: one value, or {boundary or pattern: value}.

        Raises:
            EstimatorError: A value is outside [0, 1].
            BoundaryError: No pattern matches a boundary.
        """
        self._bp_lambda = choose_lambdas(self._modules, value)

    def request_report(self) -> None:
        """Have the next training step keep its gradients for `last_report`."""
        if self._requested == "nothing":
            self._requested = "report"

    def request_probe(self) -> None:
        """Have the next training step measure the true gradients too."""
        self._requested = "probe"

    @property
    def last_report(self) -> StepReport | None:
        """The report of the last step if one was requested for it, else None."""
        return self._report

    def describe(self) -> dict[str, object]:
        """The configuration in primitives."""
        return {
            "boundaries": list(self._modules),
            **self._pool.describe(),
            "bp_lambda": self.bp_lambda,
            "loss_denominator": str(self._loss_denominator),
            "rng": self._rng,
            "on_nonfinite": "skip" if self._health.skips else "raise",
            "seed": self._pool.seed,
        }

    # ---- hooks

    def attach(self) -> None:
        """Hook the model. Outside a training step the hooks do nothing.

        Raises:
            StageError: The engine is attached already, or another one is.
        """
        # by name, since a module may have been replaced since the engine was made
        boundaries = {name: partial(self._on_boundary, name) for name in self._modules}
        self._taps.attach(self._model, boundaries, self._output, self._on_output)
        self._device = device_of(self._model)
        self._named = dict(self._model.named_parameters())

    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""
        self._taps.remove()
        self._step, self._in_forward = None, False

    def __enter__(self) -> "DNIEngine":
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _on_boundary(self, name: str, output: Any) -> Any:
        if self._step is None or not self._in_forward or not torch.is_grad_enabled():
            return None
        passed_on = self._step.cut(name, output)
        if self._rng == "stage":
            torch.manual_seed(self._stage_seed(name, self._step.fired[name]))
        return passed_on

    def _stage_seed(self, boundary: str | None, call: int) -> int:
        return derive_seed(self._pool.seed, "stage", boundary, call, self._steps, *self._replica)

    def _on_output(self, output: Any) -> None:
        if self._step is not None and self._in_forward and torch.is_grad_enabled():
            self._step.see_output(output)

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
            first: Whether it is the first of them, at which gradients are zeroed (for replicas only).
            last: Whether it is the last of them, at which replicas exchange gradients.

        Raises:
            StageError: The engine is not attached.
            BoundaryError: A boundary is changed in place, or compiled with fullgraph=True.
        """
        if not self._taps.installed:
            raise StageError(
                "Expected the engine to be attached, but the model has no hook of it. Write `with engine:` "
                "around the training loop, or call `engine.attach()`."
            )
        settings = self._settings(batch, accumulate, scale, several_losses, last)
        self._step = Step(settings, self._pool.install, self.profile, self._held)
        if settings.exchange is not None:
            settings.exchange.begin(fresh=first and not several_losses)
        self._report, self._requested, self._in_forward = None, "nothing", True
        staged = seeded(self._stage_seed(None, 0), self._device) if self._rng == "stage" else nullcontext()
        try:
            with staged, one_graph_errors(self.boundaries), in_place_errors(self._step.fired):
                yield
            if several_losses:
                refuse_other_backward(self._step.cuts)
            self._elements_per_row = self._step.elements_per_row
            self._steps += 1  # a step that failed will be taken again
        finally:
            self._in_forward, self._held = False, self._step.held()
            if several_losses:
                self._step = None

    def backward(self, loss: Tensor) -> None:
        """Differentiate `loss` through the last stage and merge every gradient that counts.

        Raises:
            StageError: No training step precedes.
            BoundaryError: A boundary did not run, or a path leaks around one.
            EstimatorError: An estimator was never told the network's output.
        """
        self.prepare_backward(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        self.finish_backward()

    def prepare_backward(self, loss: Tensor) -> None:
        """First third of `backward`, for whoever differentiates the loss: check the way down."""
        if self._step is None:
            raise StageError(
                "Expected a training step before backward, but got none. Run the forward pass inside "
                "`with engine.training_step(batch):`."
            )
        self._step.prepare(loss)

    def finish_backward(self) -> None:
        """Last third of `backward`: settle what came back and merge it into `.grad`."""
        assert self._step is not None
        step = self._step
        if not self._in_forward:  # else the forward pass of another loss may follow
            self._step = None
        cuts, number = step.finish(), self._steps - (not self._in_forward)
        self._examine(step, cuts, number)
        if step.settings.report:
            self._report = report_step(number, step, cuts, self._model, self._report, self.profile)
        self._pool.remember(step.merge(cuts, lambda: self._named | self._pool.named_parameters()))
        if self._in_forward and step.settings.exchange is not None:
            step.settings.exchange.begin(fresh=False)

    def _examine(self, step: Step, cuts: Sequence[Cut], number: int) -> None:
        scaled = step.settings.scale is not None
        if scaled or self._health.skips:
            self._health.sift(cuts, keep_stage=scaled)
        if not scaled:
            self._health.observe(number, step.loss, cuts)
        if self._exchange is None and (step.settings.check_values or self._health.is_crowded):
            self._health.look(at_once=step.settings.check_values and not scaled)

    def check_values(self) -> None:
        """Raise for what was not finite in any step since the last look; waits for an accelerator.

        Raises:
            EstimatorError, StageError: Naming what it was and the step.
        """
        self._health.look(self._exchange)

    def update_estimators(self) -> None:
        """Let each estimator take its steps; call it after the user's optimizer has stepped."""
        with self.profile("dni.estimator_step"):
            self._pool.update(self._exchange)
        self._health.end_update()

    def drop_estimator_gradients(self) -> None:
        """Forget what the estimators have learnt since their last step, when a step is skipped."""
        self._pool.drop_gradients()
        self._health.end_update()

    def _settings(
        self, batch: Any, accumulate: int, scale: Scale | None, several: bool, last: bool
    ) -> StepSettings:
        return StepSettings(
            batch=batch,
            context=find_context(batch, self._labels),
            bp_lambda=self._bp_lambda,
            loss_denominator=self._loss_denominator,
            elements_per_row=self._elements_per_row,
            accumulate=accumulate,
            scale=scale,
            report=self._requested != "nothing",
            probe=self._requested == "probe",
            check_values=self._device.type == "cpu" or self._steps == 0 or self._requested != "nothing",
            keep_lessons=self._pool.steps > 1,
            skips=self._health.skips,
            own_parameters=(lambda n: named_submodules(self._model)[n].parameters()) if several else None,
            exchange=self._exchange if last else None,
        )

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart, in tensors and primitives."""
        return {
            "version": 1,
            "steps": self._steps,
            "bp_lambda": self.bp_lambda,
            "elements_per_row": self._elements_per_row,
            "skipped": self.skipped,
            **self._pool.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, building the estimators from their saved specs.

        `bp_lambda` stays as it is where the state has none.

        Raises:
            BoundaryError: The state is of other boundaries.
            EstimatorError: An estimator's parameters or optimizer do not fit.
        """
        self._device = device_of(self._model)
        steps, elements, skipped = state["steps"], state["elements_per_row"], state["skipped"]
        self._pool.load_state_dict(state, self._device)
        self._steps, self._elements_per_row = steps, elements
        self._health.restart(skipped)
        self.set_bp_lambda(state.get("bp_lambda", self._bp_lambda))
