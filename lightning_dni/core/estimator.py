"""The contract of gradient estimators: what one is asked, what it is told, and what it declares."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lightning_dni.core.randomness import RandomStream

Gradient = tuple[Tensor, ...]
"""One tensor per leaf of the activation, in units of the per-row loss."""


class Signal(Enum):
    """What an estimator may ask to be told after it has given its gradient."""

    TARGET = "target gradient"
    OUTPUT = "network output"
    OUTPUT_GRADIENT = "gradient at the network output"
    TRUE_GRADIENT = "true gradient"
    CONSUMER = "consumer of h"
    NETWORK_INPUT = "network input"
    ESTIMATOR_ABOVE = "estimator above"


class Lock(Enum):
    """What a stage has to wait for under an estimator (Jaderberg et al. 2017, section 1)."""

    FORWARD = "forward"
    UPDATE = "update"
    BACKWARD = "backward"


class Record(NamedTuple):
    """One synthesis: what the estimator saw and what it said.

    Attributes:
        h: The activation, detached, one tensor per leaf.
        context: Labels `[batch]` or `[batch, positions]`, or a continuous context, or None.
        gradient: What was given to the stage; carries the estimator's graph where that was kept.
            None stands for exactly zero.
        state: What `synthesize` returned as its state.
    """

    h: tuple[Tensor, ...]
    context: Tensor | None
    gradient: Gradient | None
    state: Any


class Feedback(NamedTuple):
    """What came back for one synthesis, as far as the estimator's `needs` ask for it.

    Attributes:
        target: The target gradient, in the estimator's units (per-row loss).
        output: The network's output for the same rows, detached.
        output_gradient: Gradient of the loss with respect to that output, in the estimator's units.
        true_gradient: The true gradient at this boundary.
        age: Number of the stage's own updates since the synthesis.
        row_weights: Weight of each row, `[batch]`.
        mask: Which positions count.
        consumer: The layer that read `h`; the first, where there are several. None where it is in another
            process.
        network_input: The network's input.
        above: What the estimator of the next boundary predicts for the same rows (its `value`); None for the
            topmost one, which is told the network's output in its place.
        future: At a truncation, the synthetic gradient at the end of the next chunk, which goes on from this
            one; None elsewhere.
    """

    target: Gradient | None = None
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    true_gradient: Gradient | None = None
    age: Tensor | int = 0
    row_weights: Tensor | None = None
    mask: Tensor | None = None
    consumer: nn.Module | None = None
    network_input: Tensor | None = None
    above: Tensor | None = None
    future: Gradient | None = None


class Facts(NamedTuple):
    """An estimator as an error approximator (Czarnecki et al. 2017, section 6), in formulas for readers.

    Attributes:
        gradient: What `h` is given.
        synthesis: The function s of `h`.
        target: The target t of s.
        loss: The loss on t and s.
    """

    gradient: str
    synthesis: str
    target: str
    loss: str


class GradientEstimator(nn.Module, ABC):
    """Supplies the gradient at a boundary; abstract here, final in its subclasses.

    A subclass is constructed as `Estimator(spec, **options)` with the boundary's `BoundarySpec`.
    It works in units of the per-row loss: `synthesize` gives the derivative of the summed batch loss
    with respect to each row, and `loss` is a mean over rows. The engine converts to the user's loss.

    Class facts:
        needs: What `loss` and `correct` must be told. The engine calls them when all of it is there.
        locks: What the stage below has to wait for. Empty: the stage is differentiated at once. An option
            may set it on the instance; `locks_with` says so beforehand.
        relays: Whether the gradient is the target itself, which is then applied as it came, to the bit.
        keeps_graph: Whether the graph of `synthesize` costs no more than `h` and is kept for `loss`.
            Otherwise `synthesize` runs without a graph and `loss` builds it again. An option may set it on
            the instance.
        regresses: Whether `loss` is `sg_loss` of what `synthesize` gave and nothing else (but for auxiliary
            tasks at truncations).
        differentiates: Whether a regressing estimator has `parameter_gradients`; no graph of it is built
            then. An option may set it on the instance.
        stochastic: Whether it draws random numbers when it runs; it then gets a stream of its own.
        facts: Its entry in the table of estimators; None for one that is not in it.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    locks: frozenset[Lock] = frozenset()
    relays: ClassVar[bool] = False
    keeps_graph: bool = True
    regresses: ClassVar[bool] = False
    differentiates: bool = False
    stochastic: ClassVar[bool] = False
    facts: ClassVar[Facts | None] = None

    num_classes: int | None = None
    """Number of classes where the context is integer labels."""
    context_size: int | None = None
    """Width of the context where it is continuous."""
    delay: int = 0
    """How many optimizer steps later the stage is given the gradient that comes back through it."""
    ignore_index: int | None = None
    """Label of rows or positions that are padding; it need not be one of the classes."""

    @abstractmethod
    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """Give the synthetic gradient for `h`.

        Args:
            h: The activation, detached, one tensor `[batch, ...]` per leaf.
            context: Labels or continuous context, already checked against `num_classes` and
                `context_size`; None where the estimator asks for none.
            state: What the previous synthesis of a sequence returned; None at its start.

        Returns:
            One tensor per leaf, of its shape (None for exactly zero), and the state to hand on.
        """

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """The estimator's training loss, averaged over rows; None where nothing is learnt.

        Must give the same value whether or not `record` still carries a graph.
        """
        return None

    def parameter_gradients(
        self, record: Record, derivative: Gradient, scale: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Gradients of the parameters without autograd, for estimators that declare `differentiates`.

        Args:
            record: What was seen and said.
            derivative: Derivative of the loss with respect to each tensor that was said, over `scale`.
            scale: Best multiplied where it costs least.
        """
        raise NotImplementedError(f"{type(self).__name__} declares `differentiates` and must define this.")

    def correct(self, record: Record, feedback: Feedback) -> Gradient | None:
        """The gradient to use instead once feedback has arrived; None to keep the synthetic one.

        Only asked where the stage waits for feedback: an update-locked estimator, or `bp_lambda` > 0.
        """
        return None

    def value(self, record: Record) -> Tensor | None:
        """What the estimator at the boundary below may learn from; None where this one has nothing to say.

        Args:
            record: What was seen and said.
        """
        return None

    def pull_back(self, name: str, consumer: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        """What `x` is given in place of the consumer's own vector-Jacobian product.

        Only asked of estimators that need `Signal.CONSUMER`, for every linear layer or convolution that
        reads `h`. The consumer's weights are given their own gradient in any case.

        Args:
            name: Name of the consumer, the same in every run.
            consumer: The layer.
            x: What it read: `h`, or what was made of it on the way.
            gradient: Gradient at the consumer's output, in units of the user's loss.
        """
        raise NotImplementedError(f"{type(self).__name__} needs {Signal.CONSUMER} and must define this.")

    @classmethod
    def locks_with(cls, **options: Any) -> frozenset[Lock]:
        """What the stage below has to wait for under an estimator that is built with `options`."""
        return cls.locks

    @property
    def learns_from_network(self) -> bool:
        """Whether anything that the network above did ever reaches this estimator."""
        return bool(self.needs)

    @property
    def is_learned(self) -> bool:
        """Whether there is anything to train."""
        return any(True for _ in self.parameters())


class Installed(NamedTuple):
    """An estimator at its boundary, with its parameters at hand and its stream if it draws from one.

    `explicit`: whether its gradients are taken by `parameter_gradients`.
    """

    estimator: GradientEstimator
    parameters: tuple[nn.Parameter, ...]
    stream: RandomStream | None = None
    explicit: bool = False


def who(estimator: GradientEstimator, boundary: str) -> str:
    """The estimator by kind and place, for messages."""
    return f"{type(estimator).__name__} at boundary {boundary!r}"


def rows_of(h: Sequence[Tensor]) -> int:
    """Number of rows of an activation whose leaves are `[batch, ...]`."""
    return h[0].shape[0]
