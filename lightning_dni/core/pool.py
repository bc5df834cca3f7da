"""The estimators of an engine: built from their first activation or from saved state, with optimizers."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_dni.core.boundary import BoundarySpec, choose_factories
from lightning_dni.core.cut import Lesson
from lightning_dni.core.estimator import GradientEstimator, Installed, Lock, Signal
from lightning_dni.core.exchange import Exchange
from lightning_dni.core.optimizer import EstimatorOptimizers, OptimizerFactory, ScheduleFactory
from lightning_dni.core.randomness import RandomStream, derive_seed, seeded
from lightning_dni.core.synthesis import learn
from lightning_dni.errors import BoundaryError, EstimatorError

EstimatorFactory = Callable[[BoundarySpec], GradientEstimator]

EXAMPLE = "LinearEstimator, or partial(LinearEstimator, num_classes=10)"

SUPPLIED = frozenset(Signal) - {Signal.TRUE_GRADIENT, Signal.NETWORK_INPUT}
"""The signals that the engine can give."""


class EstimatorPool:
    """Estimators by boundary, and the steps they take.

    Args:
        boundaries: Names of the boundaries.
        factory: Makes an estimator from a spec; or {boundary pattern: factory}.
        optimizer: Makes their optimizer; or {boundary pattern: factory}.
        steps: Steps that the estimators take per update.
        seed: Seed of the streams in which they are built.
        schedule: Makes a learning-rate scheduler from such an optimizer.
        clip_norm: Norm to which the gradients of each estimator are clipped.

    Raises:
        EstimatorError: `steps` is below one, or `clip_norm` not positive.
        BoundaryError: No pattern matches a boundary.
    """

    def __init__(
        self,
        boundaries: Sequence[str],
        factory: EstimatorFactory | Mapping[str, EstimatorFactory],
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],
        steps: int,
        seed: int,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise EstimatorError(
                f"Expected `estimator_steps` to be an integer of at least 1, but got {steps!r}."
            )
        self._factories = choose_factories(boundaries, factory, "estimator", EXAMPLE)
        self._boundaries = tuple(boundaries)
        self._make_optimizers = partial(EstimatorOptimizers, optimizer, boundaries, schedule, clip_norm)
        self.optimizers = self._make_optimizers()
        self.steps = steps
        self.seed = seed
        self._specs: dict[str, BoundarySpec] = {}
        self.installed: dict[str, Installed] = {}
        self._twins: dict[str, Installed] = {}
        self._restored: set[str] = set()
        self._lessons: list[Lesson] = []
        self._pending = False

    def install(self, name: str, outputs: Sequence[Tensor]) -> Installed:
        """The estimator of boundary `name`, built from its activations `outputs` if it is new."""
        if name not in self.installed:
            self._build(BoundarySpec.of(name, outputs))
        elif name in self._restored:
            self._restored.discard(name)
            _check_width(self._specs[name], BoundarySpec.of(name, outputs))
        return self.installed[name]

    def twin(self, name: str, outputs: Sequence[Tensor]) -> Installed:
        """One like the estimator of boundary `name`, which another process trains and saves."""
        if name not in self._twins:
            self._twins[name] = self._make(BoundarySpec.of(name, outputs))
        return self._twins[name]

    @property
    def kinds(self) -> Mapping[str, type[GradientEstimator] | None]:
        """The class of the estimator of each boundary; None where that cannot be told from its factory."""
        return {name: made_by(factory) for name, factory in self._factories.items()}

    @property
    def factories(self) -> Mapping[str, EstimatorFactory]:
        """What makes the estimator of each boundary."""
        return self._factories

    def may_need(self, signal: Signal) -> bool:
        """Whether an estimator is known to ask for `signal`, from its class or since it was built."""
        known = any(kind is not None and signal in kind.needs for kind in self.kinds.values())
        return known or any(self.installed_needs(name, signal) for name in self.installed)

    def installed_needs(self, name: str, signal: Signal) -> bool:
        """Whether the estimator of boundary `name` is there and asks for `signal`."""
        installed = self.installed.get(name)
        return installed is not None and signal in installed.estimator.needs

    def _build(self, spec: BoundarySpec) -> None:
        self._specs[spec.name], self.installed[spec.name] = spec, self._make(spec)
        self.optimizers.add(spec.name, self.installed[spec.name])

    def _make(self, spec: BoundarySpec) -> Installed:
        with seeded(derive_seed(self.seed, "estimator", spec.name), spec.device):
            estimator = self._factories[spec.name](spec)
        _check(estimator, spec)
        if any(estimator is other.estimator for other in self.installed.values()):
            raise EstimatorError(
                f"Expected `estimator` to make a new estimator for boundary {spec.name!r}, but got the "
                f"{type(estimator).__name__} of another boundary. Build one in every call."
            )
        dtype = torch.float32
        for leaf in spec.leaves:
            dtype = torch.promote_types(dtype, leaf.dtype)
        estimator.to(device=spec.device, dtype=dtype)
        return Installed(
            estimator,
            tuple(p for p in estimator.parameters() if p.requires_grad),
            RandomStream(derive_seed(self.seed, "stream", spec.name), spec.device)
            if estimator.stochastic
            else None,
            # a parametrized weight is no leaf: autograd knows the way to what is
            estimator.differentiates and not any(map(is_parametrized, estimator.modules())),
        )

    def remember(self, lessons: Sequence[Lesson]) -> None:
        """Note that gradients wait for the next update, and keep what they came from."""
        self._pending = True
        self.optimizers.make()  # before the user's optimizer moves anything, if it cannot be made
        self._lessons.extend(lessons)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What the estimators train, by boundary and name."""
        return {
            f"{boundary}: {name}": parameter
            for boundary in sorted(self.installed)
            for name, parameter in self.installed[boundary].estimator.named_parameters()
            if parameter.requires_grad
        }

    def update(self, exchange: Exchange | None = None) -> None:
        """Step with the accumulated gradients, then again on the same lessons as often as asked.

        Args:
            exchange: Averages the gradients of those further steps over replicas.
        """
        if not self._pending:
            return
        self._pending = False
        self.optimizers.step()
        for _ in range(self.steps - 1):
            for installed, record, feedback, share in self._lessons:
                loss = learn(installed, record, feedback, share)
                if loss is not None:
                    loss.backward()  # type: ignore[no-untyped-call]
            if exchange is not None:
                exchange.average(list(self.named_parameters().values()))
            self.optimizers.step()
        self.optimizers.advance()
        self._lessons.clear()

    def drop_gradients(self) -> None:
        """Forget what the estimators have learnt since their last step."""
        if not self._pending:
            return
        self._pending = False
        self.optimizers.zero_grad()
        self._lessons.clear()

    def keep(self, boundaries: Collection[str], twins: Collection[str] = ()) -> None:
        """Let go of every estimator but those at `boundaries`, which train on as before, and of `twins`."""
        self._twins = {n: i for n, i in self.installed.items() if n in twins}
        self.optimizers = self.optimizers.part(self._make_optimizers(), self.installed, boundaries)
        self.installed = {n: i for n, i in self.installed.items() if n in boundaries}
        self._specs = {n: spec for n, spec in self._specs.items() if n in boundaries}
        self._restored &= set(boundaries)

    def describe(self) -> dict[str, object]:
        """The estimators in primitives."""
        estimators = {name: installed.estimator for name, installed in self.installed.items()}
        delays = {name: estimator.delay for name, estimator in estimators.items() if estimator.delay}
        return {
            "estimators": {n: type(e).__name__ for n, e in estimators.items()},
            "learns_from_network": {n: e.learns_from_network for n, e in estimators.items()},
            "delays": delays,
            "estimator_parameters": {
                n: sum(p.numel() for p in i.parameters) for n, i in self.installed.items()
            },
            "estimator_optimizers": [
                {"name": type(o).__name__, "lr": o.param_groups[0].get("lr")} for o in self.optimizers
            ],
            "estimator_steps": self.steps,
            "estimator_clip_norm": self.optimizers.clip_norm,
        }

    def state_dict(self) -> dict[str, Any]:
        """Specs, parameters, streams and optimizers, in tensors and primitives."""
        return {
            "boundaries": list(self._boundaries),
            "seed": self.seed,
            "specs": [spec.state_dict() for spec in self._specs.values()],
            "kinds": {n: type(i.estimator).__name__ for n, i in self.installed.items()},
            "estimators": {n: i.estimator.state_dict() for n, i in self.installed.items()},
            "streams": {n: i.stream.state_dict() for n, i in self.installed.items() if i.stream is not None},
            "optimizers": self.optimizers.state_dict(),
            "schedules": self.optimizers.schedules(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the saved pool: its estimators are built on `device` in place of those here.

        Raises:
            BoundaryError: The state is of other boundaries.
            EstimatorError: An estimator or an optimizer does not fit.
        """
        if sorted(state["boundaries"]) != sorted(self._boundaries):
            raise BoundaryError(
                f"Expected the state of boundaries {list(self._boundaries)}, but got that of "
                f"{list(state['boundaries'])}. Resume with the `boundaries` of the saved run, or start its "
                "estimators afresh."
            )
        before = self._specs, self.installed, self.seed, self.optimizers, self._restored
        here, self._specs, self.installed, self._restored = self._specs, {}, {}, set()
        try:
            self._become(state, device, here)
        except Exception:  # a state that is refused changes nothing
            self._specs, self.installed, self.seed, self.optimizers, self._restored = before
            raise
        self._pending = False
        self._lessons.clear()

    def _become(
        self, state: Mapping[str, Any], device: torch.device, here: Mapping[str, BoundarySpec]
    ) -> None:
        self.seed = state["seed"]
        self.optimizers = self._make_optimizers()
        for saved in state["specs"]:
            spec = BoundarySpec.from_state_dict(saved, device)
            if spec.name in here:
                _check_width(spec, here[spec.name])
            self._build(spec)
            self._load(spec.name, state["kinds"][spec.name], state["estimators"][spec.name])
            self._restored.add(spec.name)
        for name, stream in state["streams"].items():
            installed = self.installed[name]
            if installed.stream is not None:
                installed.stream.load_state_dict(stream)
        if "optimizers" in state:  # absent where only weights were saved
            self.optimizers.load_state_dict(state["optimizers"])
            self.optimizers.load_schedules(state["schedules"])

    def _load(self, name: str, kind: str, state: Mapping[str, Tensor]) -> None:
        estimator = self.installed[name].estimator
        if type(estimator).__name__ != kind:
            raise EstimatorError(
                f"Expected the state of a {type(estimator).__name__} at boundary {name!r}, but got that of a "
                f"{kind}. Resume with the `estimator` of the saved run."
            )
        try:
            estimator.load_state_dict(state)
        except RuntimeError as error:
            raise EstimatorError(
                f"Expected the state of a {type(estimator).__name__} at boundary {name!r}, but got one that "
                f"does not fit: {' '.join(str(error).split())} Resume with the `estimator` of the saved run."
            ) from error


def made_by(factory: Any) -> type[GradientEstimator] | None:
    """The class that an estimator factory makes; None where that cannot be read off it."""
    made = factory.func if isinstance(factory, partial) else factory
    return made if isinstance(made, type) and issubclass(made, GradientEstimator) else None


def may_ask(factories: Iterable[EstimatorFactory], signals: Collection[Signal]) -> bool:
    """Whether an estimator may ask for one of these `signals`; one that a function makes may."""
    kinds = map(made_by, factories)
    return any(made is None or not made.needs.isdisjoint(signals) for made in kinds)


def locks_made_by(factory: Any) -> frozenset[Lock]:
    """What stages wait for under what an estimator factory makes; nothing where it cannot be read off it."""
    made = made_by(factory)
    if made is None:
        return frozenset()
    return made.locks_with(**(factory.keywords if isinstance(factory, partial) else {}))


def _check_width(saved: BoundarySpec, here: BoundarySpec) -> None:
    """Refuse the state of another width; lengths of sequences and sizes of maps may differ."""
    pairs = list(zip((s.shape for s in saved.leaves), (s.shape for s in here.leaves), strict=False))
    if len(saved.leaves) != len(here.leaves) or not all(_same_width(a, b) for a, b in pairs):
        now, then = ([leaf.shape for leaf in s.leaves] for s in (here, saved))
        raise EstimatorError(
            f"Expected the state of an estimator for rows of shapes {now} at boundary {here.name!r}, but got "
            f"one for {then}. Resume with the model of the saved run, or start the estimators afresh."
        )


def _same_width(saved: tuple[int, ...], here: tuple[int, ...]) -> bool:
    if len(saved) != len(here) or len(saved) < 2:
        return saved == here
    features_first = saved[0] == here[0]
    features_last = saved[-1] == here[-1] and (len(saved) == 2 or saved[1] != here[1])
    return features_first or features_last


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
