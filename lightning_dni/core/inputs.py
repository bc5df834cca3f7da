"""Synthetic inputs: in training a stage goes on from what is predicted of the stage below (complete unlock).

An input estimator at a boundary predicts what crosses there from the network's input alone, so that no stage
need wait for the one below to run (Jaderberg et al. 2017). It learns from what the stage below has made,
which itself ran on a synthetic input. The gradient estimator is told the gradient at the synthetic `h`, and
learns what it says there; the stage below is given what it says at its own output. Outside of training steps
nothing is synthetic.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dni.core.boundary import BoundarySpec, LeafSpec, choose_factories
from lightning_dni.core.context import Where, find_input
from lightning_dni.core.distance import difference_sums
from lightning_dni.core.optimizer import EstimatorOptimizers, OptimizerFactory
from lightning_dni.core.randomness import derive_seed, seeded
from lightning_dni.core.stage import local_gradients, without_autocast
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError, StageError


class InputEstimator(nn.Module, ABC):
    """Predicts what crosses a boundary; abstract here, final in its subclasses.

    A subclass is constructed as `Estimator(spec, **options)` with the boundary's `BoundarySpec`, which has
    the network's `input`. It is trained on the squared L2 distance to what really crossed, per row, averaged
    over rows. It draws no random numbers when it runs.
    """

    @abstractmethod
    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor per leaf of the activation, of its shape.

        Args:
            x: The network's input `[batch, ...]`, in the precision of the estimator.
        """


InputFactory = Callable[[BoundarySpec], InputEstimator]


class Trained(NamedTuple):
    """An input estimator and what of it is trained."""

    estimator: InputEstimator
    parameters: tuple[nn.Parameter, ...]


@dataclass
class Crossed:
    """What a boundary has passed on.

    Attributes:
        leaves: Boundary tensors, in place of the activation's.
        synthetic: Whether they were predicted.
        gradients: What the input estimator has learnt from the activation, by parameter.
        loss: Its loss; None where it has learnt nothing.
        error: Squared distance of prediction and activation, and the square of the activation, summed; where
            it is asked for.
    """

    leaves: list[Tensor]
    synthetic: bool = False
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    loss: Tensor | None = None
    error: Tensor | None = None


class SyntheticInputs:
    """The input estimators of an engine, and their steps.

    Args:
        boundaries: Names of the boundaries.
        factory: Makes an input estimator from a spec; or {boundary pattern: factory, or None for the real h}.
        network_input: Where the network's input is in a batch, as `find_input` takes it.
        optimizer: Makes their optimizer; or {boundary pattern: factory}.
        seed: Seed of the streams in which they are built.

    Raises:
        BoundaryError: No pattern matches a boundary.
    """

    def __init__(
        self,
        boundaries: Sequence[str],
        factory: InputFactory | Mapping[str, InputFactory | None],
        network_input: Where,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
        seed: int,
    ) -> None:
        choice: Any = factory
        self._factories: dict[str, InputFactory | None] = choose_factories(
            boundaries, choice, "synthetic_inputs", "MLPInputEstimator, or a partial of it", optional=True
        )
        self._network_input, self._seed = network_input, seed
        make = partial(torch.optim.Adam, lr=1e-3, fused=True) if optimizer is None else optimizer
        self._make_optimizers = partial(EstimatorOptimizers, make, boundaries, argument="input_optimizer")
        self._optimizers = self._make_optimizers()
        self._specs: dict[str, BoundarySpec] = {}
        self._trained: dict[str, Trained] = {}
        self._batch: Any = None
        self._pending = False

    @property
    def estimators(self) -> dict[str, InputEstimator]:
        """The input estimators built so far, by boundary."""
        return {name: trained.estimator for name, trained in self._trained.items()}

    def covers(self, boundary: str) -> bool:
        """Whether what crosses `boundary` is predicted."""
        return self._factories[boundary] is not None

    # ---- one step

    def begin(self, batch: Any, several_losses: bool) -> None:
        """A training step on `batch` begins.

        Raises:
            StageError: It may have several forward passes, of other inputs.
        """
        if several_losses:
            raise StageError(
                "Expected one loss per training step with synthetic inputs, but got several_losses=True: the "
                "batch has one network input. Train with automatic optimization."
            )
        self._batch = batch

    def end(self) -> None:
        """It is over."""
        self._batch = None

    def cross(
        self, boundary: str, outputs: Sequence[Tensor], calls: int, learns: bool, share: float, measure: bool
    ) -> Crossed:
        """Predict what to pass on in place of `outputs`, and learn from them.

        Args:
            boundary: Name of the boundary.
            outputs: What the stage below has made.
            calls: How often the boundary has run in this step.
            learns: Whether the stage below takes part in this step.
            share: The share of this forward pass in the user's step.
            measure: Whether the error is asked for.

        Raises:
            EstimatorError: The boundary runs several times, or the prediction or the input does not fit.
        """
        if calls > 1:
            raise EstimatorError(
                f"Expected boundary {boundary!r} to run once in a step with synthetic inputs, but it runs "
                "again, and the batch has one network input. Leave it out: synthetic_inputs="
                f"{{{boundary!r}: None, ...}}."
            )
        x = find_input(self._batch, self._network_input)
        trained = self._install(boundary, outputs, x)
        with without_autocast(outputs[0].device.type), torch.set_grad_enabled(learns):
            predicted = self._predict(boundary, trained, x, outputs)
            said = tuple(p.detach() for p in predicted)
            real = tuple(h.detach().to(p.dtype) for h, p in zip(outputs, said, strict=True))
            loss, made = None, list[tuple[Tensor, Tensor]]()
            if learns and trained.parameters:
                loss = sg_loss(predicted, real)
                made = local_gradients([loss * share], None, trained.parameters)
        error = _error(said, real) if measure else None
        leaves = [p.to(h.dtype).requires_grad_() for p, h in zip(said, outputs, strict=True)]
        return Crossed(leaves, True, made, None if loss is None else loss.detach(), error)

    def _predict(
        self, boundary: str, trained: Trained, x: Tensor, outputs: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        dtype = next((p.dtype for p in trained.estimator.parameters()), torch.float32)
        predicted = trained.estimator.predict(x.detach().to(device=outputs[0].device, dtype=dtype))
        expected, got = [tuple(h.shape) for h in outputs], [tuple(p.shape) for p in predicted]
        if expected != got:
            raise EstimatorError(
                f"Expected the {type(trained.estimator).__name__} at boundary {boundary!r} to predict "
                f"tensors of shapes {expected}, but got {got}. The network's input has shape "
                f"{tuple(x.shape)}; pass `network_input=` a callable of the batch if it is another."
            )
        return predicted

    def _install(self, name: str, outputs: Sequence[Tensor], x: Tensor) -> Trained:
        if name not in self._trained:
            spec = BoundarySpec.of(name, outputs)
            self._build(replace(spec, input=LeafSpec(tuple(x.shape[1:]), x.dtype)))
        return self._trained[name]

    def _build(self, spec: BoundarySpec) -> None:
        factory = self._factories[spec.name]
        assert factory is not None
        with seeded(derive_seed(self._seed, "input", spec.name), spec.device):
            estimator = factory(spec)
        if not isinstance(estimator, InputEstimator):
            raise EstimatorError(
                f"Expected `synthetic_inputs` to make an InputEstimator for boundary {spec.name!r}, but got "
                f"{type(estimator).__name__}. Pass MLPInputEstimator, or a subclass of InputEstimator."
            )
        dtype = torch.float32
        for leaf in spec.leaves:
            dtype = torch.promote_types(dtype, leaf.dtype)
        estimator.to(device=spec.device, dtype=dtype)
        self._specs[spec.name] = spec
        parameters = tuple(p for p in estimator.parameters() if p.requires_grad)
        self._trained[spec.name] = Trained(estimator, parameters)
        self._optimizers.add(spec.name, self._trained[spec.name])

    # ---- steps

    def remember(self) -> None:
        """Note that gradients wait for the next update."""
        self._pending = True
        self._optimizers.make()

    def update(self) -> None:
        """Step with the accumulated gradients."""
        if self._pending:
            self._pending = False
            self._optimizers.step()

    def drop_gradients(self) -> None:
        """Forget what was learnt since the last step."""
        self._pending = False
        self._optimizers.zero_grad()

    # ---- state

    def describe(self) -> dict[str, str]:
        """What predicts the input above each boundary."""
        return {name: type(trained.estimator).__name__ for name, trained in self._trained.items()}

    def state_dict(self) -> dict[str, Any]:
        """Specs, parameters and optimizers, in tensors and primitives."""
        return {
            "specs": [spec.state_dict() for spec in self._specs.values()],
            "kinds": self.describe(),
            "estimators": {n: t.estimator.state_dict() for n, t in self._trained.items()},
            "optimizers": self._optimizers.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Become the saved ones, built on `device`; optimizers start afresh where only weights were saved.

        Raises:
            EstimatorError: An input estimator is of another kind or width, or there is none at its boundary.
        """
        before = self._specs, self._trained, self._optimizers
        self._specs, self._trained, self._optimizers = {}, {}, self._make_optimizers()
        try:
            for saved in state["specs"]:
                self._restore(BoundarySpec.from_state_dict(saved, device), state)
            if "optimizers" in state:
                self._optimizers.load_state_dict(state["optimizers"])
        except Exception:  # a state that is refused changes nothing
            self._specs, self._trained, self._optimizers = before
            raise
        self._pending = False

    def _restore(self, spec: BoundarySpec, state: Mapping[str, Any]) -> None:
        name = spec.name
        if self._factories.get(name) is None:
            raise EstimatorError(
                f"Expected no input estimator at boundary {name!r}, but the state has one. Resume with the "
                "`synthetic_inputs` of the saved run."
            )
        self._build(spec)
        estimator, kind = self._trained[name].estimator, state["kinds"][name]
        if type(estimator).__name__ != kind:
            raise EstimatorError(
                f"Expected the state of a {type(estimator).__name__} for the inputs at boundary {name!r}, "
                f"but got that of a {kind}. Resume with the `synthetic_inputs` of the saved run."
            )
        try:
            estimator.load_state_dict(state["estimators"][name])
        except RuntimeError as error:
            raise EstimatorError(
                f"Expected the state of a {kind} for the inputs at boundary {name!r}, but got one that does "
                f"not fit: {' '.join(str(error).split())} Resume with the `synthetic_inputs` of the saved "
                "run."
            ) from error


def _error(said: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    sums = [difference_sums(p.flatten(1), h.flatten(1)) for p, h in zip(said, real, strict=True)]
    return torch.stack([torch.stack(pair) for pair in sums]).sum(0)


def no_truth() -> StageError:
    """What to say to who asks for true gradients."""
    return StageError(
        "Expected no probe of true gradients with synthetic inputs, but got one: the loss depends on no "
        "stage below one. Leave it out (GradientMonitor(probe=False)); `dni_input_error` says how far inputs "
        "are off."
    )


def refuse_replicas(exchange: object | None) -> None:
    """Refuse processes that average gradients.

    Raises:
        StageError: There are some.
    """
    if exchange is not None:
        raise StageError(
            "Expected no replicas with synthetic inputs, but got an `exchange`: input estimators would learn "
            "from the rows of one process each. Train in one process: strategy='dni'."
        )


def not_finite(boundary: str) -> EstimatorError:
    """What to say of an input estimator whose loss is not."""
    return EstimatorError(
        f"Expected finite activations and synthetic inputs at boundary {boundary!r}, but got others. Lower "
        "the learning rate of the network, or of `input_optimizer`, or pass on_nonfinite='skip'."
    )
