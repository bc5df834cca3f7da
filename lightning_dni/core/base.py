"""What every engine has, however it runs a step: options, estimators, requests, and what must be saved."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dni.core.bootstrap import SequenceEnd
from lightning_dni.core.boundary import device_of, named_submodules, resolve_boundaries, resolve_output
from lightning_dni.core.carry import (
    Truncations,
    refuse_beside_truncations,
    refuse_without_truncations,
    resolve_truncations,
)
from lightning_dni.core.context import Labels, Where, find_context
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.health import Health, OnNonfinite
from lightning_dni.core.immediate import ImmediateUpdates, Updater, check_update
from lightning_dni.core.inputs import (
    InputEstimator,
    InputFactory,
    SyntheticInputs,
    no_truth,
    refuse_replicas,
)
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory, EstimatorPool
from lightning_dni.core.profile import Profile, no_profile
from lightning_dni.core.report import StepReport
from lightning_dni.core.settings import Scale, StepSettings
from lightning_dni.core.sparse import choose_probabilities
from lightning_dni.core.target import Denominator, check_denominator, choose_lambdas
from lightning_dni.errors import EstimatorError

UpdateTime = Literal["step", "immediate"]
"""When a stage's parameters step: in the user's optimizer step, or as soon as their gradient is there."""


class Engine(ABC):
    """Options, estimators and reports of an engine; see `DNIEngine` for the arguments.

    Attributes:
        profile: Times the phases of a step.
        updater: What updates the parameters of a stage by themselves, with `update="immediate"`.

    Raises:
        EstimatorError: An option is out of its range.
        BoundaryError: No pattern matches a boundary, or `output` names no submodule.
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
        update_probability: float | Mapping[str, float] = 1.0,
        update: UpdateTime = "step",
        loss_denominator: Denominator = "batch",
        rng: Literal["global", "stage"] = "global",
        on_nonfinite: OnNonfinite = "raise",
        seed: int | None = None,
        exchange: Exchange | None = None,
        rank: int = 0,
        synthetic_inputs: InputFactory | Mapping[str, InputFactory | None] | None = None,
        network_input: Where = "auto",
        input_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        truncations: Truncations | None = None,
        damping: float | Mapping[str, float] = 1.0,
        sequence_end: SequenceEnd = "zero",
    ) -> None:
        check_denominator(loss_denominator)
        if rng not in ("global", "stage"):
            raise EstimatorError(f"Expected `rng` to be 'global' or 'stage', but got {rng!r}.")
        check_update(update, has_replicas=exchange is not None)
        self._model = model
        if truncations:
            refuse_beside_truncations(bp_lambda, update_probability, update, synthetic_inputs)
        else:
            refuse_without_truncations(damping, sequence_end)
        self._modules = resolve_boundaries(model, boundaries) if boundaries or not truncations else {}
        self._truncations, self._damping, self._sequence_end = truncations, damping, sequence_end
        self._names = (*self._modules, *resolve_truncations(model, truncations))
        self._output_name = output
        resolve_output(model, output)
        self._labels = labels
        self._loss_denominator = loss_denominator
        self._rng = rng
        self._health = Health(on_nonfinite, self._names)
        self._exchange, self._replica = exchange, (rank,) if rank else ()
        self._bp_lambda = choose_lambdas(self._modules, bp_lambda)
        self._update_probability = choose_probabilities(self._modules, update_probability)
        self._asleep: frozenset[str] | None = None
        self._update: UpdateTime = update
        self._immediate: ImmediateUpdates | None = None
        self.updater: Updater | None = None
        self._pool = EstimatorPool(
            self._names,
            estimator,
            estimator_optimizer or partial(torch.optim.Adam, lr=1e-3, fused=True),
            estimator_steps,
            torch.initial_seed() if seed is None else seed,
            estimator_scheduler,
            estimator_clip_norm,
        )
        self._inputs: SyntheticInputs | None = None
        if synthetic_inputs is not None:
            refuse_replicas(exchange)
            names, seed = tuple(self._modules), self._pool.seed
            self._inputs = SyntheticInputs(names, synthetic_inputs, network_input, input_optimizer, seed)
        self.profile: Profile = no_profile
        self._device = device_of(model)
        self._elements_per_row: int | None = None
        self._steps = 0
        self._requested: Literal["nothing", "report", "probe"] = "nothing"
        self._instruments: list[Instrument] = []
        self._report: StepReport | None = None
        self._reset()

    @abstractmethod
    def _reset(self) -> None:
        """Forget the run in progress, or have none yet."""

    def _find_device(self) -> torch.device:
        """Where training steps compute."""
        return device_of(self._model)

    # ---- what others may see

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Names of the boundaries (or truncations), in the order in which the model registers them."""
        return self._names

    @property
    def estimators(self) -> dict[str, GradientEstimator]:
        """The estimators built so far, by boundary."""
        return {name: installed.estimator for name, installed in self._pool.installed.items()}

    @property
    def bp_lambda(self) -> dict[str, float]:
        """The lambda of BP(lambda) at each boundary."""
        return dict(self._bp_lambda)

    @property
    def update_probability(self) -> dict[str, float]:
        """With which probability the stage below each boundary, and the last one, updates in a step."""
        return dict(self._update_probability)

    @property
    def updates_immediately(self) -> bool:
        """Whether stages step as soon as their gradient is there."""
        return self._update == "immediate"

    @property
    def skipped(self) -> dict[str, int]:
        """Number of estimator updates so far that left out something that was not finite, by boundary."""
        return dict(self._health.skipped)

    def set_bp_lambda(self, value: float | Mapping[str, float]) -> None:
        """Change lambda from the next training step on: one value, or {boundary or pattern: value}.

        Raises:
            EstimatorError: A value is outside [0, 1], or above 0 with truncations.
            BoundaryError: No pattern matches a boundary.
        """
        chosen = choose_lambdas(self._modules, value)
        if self._truncations and any(chosen.values()):
            refuse_beside_truncations(value, 1.0, "step", None)
        self._bp_lambda = chosen

    @property
    def predicts_inputs(self) -> bool:
        """Whether stages go on from synthetic inputs in training."""
        return self._inputs is not None

    @property
    def input_estimators(self) -> dict[str, InputEstimator]:
        """What predicts the input above each boundary, as far as built; empty without synthetic inputs."""
        return {} if self._inputs is None else self._inputs.estimators

    def request_report(self) -> None:
        """Have the next training step keep its gradients for `last_report`."""
        if self._requested == "nothing":
            self._requested = "report"

    def request_probe(self, instrument: Instrument | None = None) -> None:
        """Have the next training step measure the true gradients too.

        Args:
            instrument: What else to measure at every boundary; see `Observation`.

        Raises:
            StageError: Inputs are synthetic, and no gradient comes down from the loss to the stages.
        """
        if self._inputs is not None:
            raise no_truth()
        self._requested = "probe"
        if instrument is not None and instrument not in self._instruments:
            self._instruments.append(instrument)

    @property
    def last_report(self) -> StepReport | None:
        """The report of the last step if one was requested for it, else None."""
        return self._report

    @property
    def report_delay(self) -> int:
        """Number of optimizer steps after which `last_report` tells of a step for which it was requested."""
        return 0

    @property
    def probes_synchronously(self) -> bool:
        """Whether processes that else run ahead of each other have to meet for a probe."""
        return False

    def describe(self) -> dict[str, object]:
        """The configuration in primitives."""
        return {
            "boundaries": list(self._modules),
            **self._pool.describe(),
            "bp_lambda": self.bp_lambda,
            "update_probability": {n.strip("()"): p for n, p in self._update_probability.items()},
            "update": self._update,
            "loss_denominator": str(self._loss_denominator),
            "rng": self._rng,
            "on_nonfinite": "skip" if self._health.skips else "raise",
            "seed": self._pool.seed,
            **({} if self._inputs is None else {"synthetic_inputs": self._inputs.describe()}),
        }

    def time_with(self, profile: Profile) -> None:
        """Have `profile` time the phases of a step."""
        self.profile = profile

    # ---- one step, as each engine runs it

    @abstractmethod
    def attach(self) -> None:
        """Hook the model. Outside a training step the hooks do nothing."""

    @abstractmethod
    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""

    @abstractmethod
    def training_step(
        self,
        batch: Any = None,
        *,
        accumulate: int = 1,
        scale: Scale | None = None,
        several_losses: bool = False,
        first: bool = True,
        last: bool = True,
    ) -> AbstractContextManager[None]:
        """The block around a training forward pass."""

    @property
    def differentiates_loss(self) -> bool:
        """Whether the loss of this step is to be differentiated, or the last stage sits the step out."""
        return True

    @abstractmethod
    def prepare_backward(self, loss: Tensor) -> Tensor:
        """First third of a backward pass, for whoever differentiates the loss that this returns."""

    @abstractmethod
    def finish_backward(self) -> None:
        """Last third of a backward pass: merge what was set aside into `.grad`."""

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
            if self._inputs is not None:
                self._inputs.update()
        self._health.end_update()

    def drop_estimator_gradients(self) -> None:
        """Forget what the estimators have learnt since their last step, when a step is skipped."""
        self._pool.drop_gradients()
        if self._inputs is not None:
            self._inputs.drop_gradients()
        self._health.end_update()

    @property
    def _checks_values(self) -> bool:
        """Whether the next step looks at values, which waits for an accelerator."""
        return self._device.type == "cpu" or self._steps == 0 or self._requested != "nothing"

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
            instruments=tuple(self._instruments),
            check_values=self._checks_values,
            keep_lessons=self._pool.steps > 1,
            skips=self._health.skips,
            own_parameters=(lambda n: named_submodules(self._model)[n].parameters()) if several else None,
            exchange=self._exchange if last else None,
            asleep=self._asleep or frozenset(),
            updates=self._immediate,
            inputs=self._inputs,
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
            **({} if self._inputs is None else {"inputs": self._inputs.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, building the estimators from their saved specs.

        `bp_lambda` stays as it is where the state has none.

        Raises:
            BoundaryError: The state is of other boundaries.
            EstimatorError: An estimator's parameters or optimizer do not fit.
        """
        self._device = self._find_device()
        steps, elements, skipped = state["steps"], state["elements_per_row"], state["skipped"]
        self._pool.load_state_dict(state, self._device)
        if self._inputs is not None and "inputs" in state:
            self._inputs.load_state_dict(state["inputs"], self._device)
        self._steps, self._elements_per_row = steps, elements
        self._health.restart(skipped)
        self._asleep = None
        self.set_bp_lambda(state.get("bp_lambda", self._bp_lambda))
