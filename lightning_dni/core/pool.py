"""The estimators of an engine: built from their first activation or from saved state, with optimizers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dni.core.boundary import BoundarySpec, choose_by_pattern
from lightning_dni.core.estimator import GradientEstimator, Installed, Signal
from lightning_dni.core.optimizer import EstimatorOptimizers, OptimizerFactory
from lightning_dni.core.randomness import derive_seed, seeded
from lightning_dni.core.step import Lesson
from lightning_dni.errors import BoundaryError, EstimatorError

EstimatorFactory = Callable[[BoundarySpec], GradientEstimator]

SUPPLIED = frozenset({Signal.TARGET, Signal.OUTPUT})
"""The signals that the engine can give."""


class EstimatorPool:
    """Estimators by boundary, and the steps they take.

    Args:
        boundaries: Names of the boundaries.
        factory: Makes an estimator from a spec; or {boundary pattern: factory}.
        optimizer: Makes their optimizer; or {boundary pattern: factory}.
        steps: Steps that the estimators take per update.
        seed: Seed of the streams in which they are built.

    Raises:
        EstimatorError: `steps` is below one.
        BoundaryError: No pattern matches a boundary.
    """

    def __init__(
        self,
        boundaries: Sequence[str],
        factory: EstimatorFactory | Mapping[str, EstimatorFactory],
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],
        steps: int,
        seed: int,
    ) -> None:
        if steps < 1:
            raise EstimatorError(f"Expected `estimator_steps` to be at least 1, but got {steps}.")
        self._factories = {n: choose_by_pattern(n, factory, "estimator") for n in boundaries}
        self.optimizers = EstimatorOptimizers(optimizer, boundaries)
        self.steps = steps
        self._seed = seed
        self._specs: dict[str, BoundarySpec] = {}
        self.installed: dict[str, Installed] = {}
        self._lessons: list[Lesson] = []

    def install(self, name: str, outputs: Sequence[Tensor]) -> Installed:
        """The estimator of boundary `name`, built from its activations `outputs` if it is new."""
        if name not in self.installed:
            self._build(BoundarySpec.of(name, outputs))
        return self.installed[name]

    def _build(self, spec: BoundarySpec) -> None:
        with seeded(derive_seed(self._seed, "estimator", spec.name), spec.device):
            estimator = self._factories[spec.name](spec)
        _check(estimator, spec)
        dtype = torch.float32
        for leaf in spec.leaves:
            dtype = torch.promote_types(dtype, leaf.dtype)
        estimator.to(device=spec.device, dtype=dtype)
        installed = Installed(estimator, tuple(p for p in estimator.parameters() if p.requires_grad))
        self._specs[spec.name], self.installed[spec.name] = spec, installed
        self.optimizers.add(spec.name, installed)

    def remember(self, lessons: Sequence[Lesson]) -> None:
        """Keep what the estimators learnt from until the next update."""
        self._lessons.extend(lessons)

    def update(self) -> None:
        """Step with the accumulated gradients, then again on the same lessons as often as asked."""
        self.optimizers.step()
        for _ in range(self.steps - 1):
            for (estimator, _), record, feedback, share in self._lessons:
                loss = estimator.loss(record, feedback)
                if loss is not None:
                    (loss * share).backward()  # type: ignore[no-untyped-call]
            self.optimizers.step()
        self._lessons.clear()

    def drop_gradients(self) -> None:
        """Forget what the estimators have learnt since their last step."""
        self.optimizers.zero_grad()
        self._lessons.clear()

    def describe(self) -> dict[str, object]:
        """The estimators in primitives."""
        estimators = {name: installed.estimator for name, installed in self.installed.items()}
        return {
            "estimators": {n: type(e).__name__ for n, e in estimators.items()},
            "learns_from_network": {n: e.learns_from_network for n, e in estimators.items()},
            "estimator_parameters": {
                n: sum(p.numel() for p in i.parameters) for n, i in self.installed.items()
            },
            "estimator_optimizers": [
                {"name": type(o).__name__, "lr": o.param_groups[0].get("lr")} for o in self.optimizers
            ],
            "estimator_steps": self.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Specs, parameters and optimizers, in tensors and primitives."""
        return {
            "specs": [spec.state_dict() for spec in self._specs.values()],
            "estimators": {n: i.estimator.state_dict() for n, i in self.installed.items()},
            "optimizers": self.optimizers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Build the saved estimators on `device` and load them.

        Raises:
            BoundaryError: The state holds a boundary that is not here.
            EstimatorError: An estimator or an optimizer does not fit.
        """
        names = [spec["name"] for spec in state["specs"]]
        unknown = [name for name in names if name not in self._factories]
        if unknown:
            raise BoundaryError(
                f"Expected the state of boundaries among {list(self._factories)}, but got {unknown} too. "
                "Resume with the `boundaries` of the saved run, or start its estimators afresh."
            )
        for spec in state["specs"]:
            if spec["name"] not in self.installed:
                self._build(BoundarySpec.from_state_dict(spec, device))
            self._load(spec["name"], state["estimators"][spec["name"]])
        if "optimizers" in state:  # absent where only weights were saved
            self.optimizers.load_state_dict(state["optimizers"])

    def _load(self, name: str, state: Mapping[str, Tensor]) -> None:
        estimator = self.installed[name].estimator
        try:
            estimator.load_state_dict(state)
        except RuntimeError as error:
            raise EstimatorError(
                f"Expected the state of a {type(estimator).__name__} at boundary {name!r}, but got one "
                f"that does not fit: {error} Resume with the `estimator` of the saved run."
            ) from error


def _check(estimator: GradientEstimator, spec: BoundarySpec) -> None:
    if not isinstance(estimator, GradientEstimator):
        raise EstimatorError(
            f"Expected `estimator` to make a GradientEstimator for boundary {spec.name!r}, but got "
            f"{type(estimator).__name__}. Pass a subclass, or a partial of one."
        )
    missing = estimator.needs - SUPPLIED
    if missing:
        raise EstimatorError(
            f"Expected {type(estimator).__name__} at boundary {spec.name!r} to need only "
            f"{sorted(s.value for s in SUPPLIED)}, but it needs {sorted(s.value for s in missing)}, "
            "which the engine does not supply."
        )
