"""The layers of a stage that read what has come from below, where the estimator there gives the way back."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_dni.core.consumer import Consumers, Hybrid, Layer, linear_layers, look_down
from lightning_dni.core.cut import Cut, refuse_untold
from lightning_dni.core.estimator import Signal
from lightning_dni.core.pool import EstimatorPool
from lightning_dni.core.probe import true_at_top
from lightning_dni.core.stage import Stage
from lightning_dni.core.tap import Taps, drop_compiled


class Readers:
    """Swaps the layers of a stage that read the output of the boundary below, if its estimator asks for them.

    That estimator trains and is saved with the stage below. Its twin here, built or restored from the same
    seed, gives the same vector-Jacobian products, so that what goes down is the gradient that it speaks of.

    Args:
        model: The whole model.
        pool: Makes the twin.

    Attributes:
        below: The boundary below, if its estimator asks for the layers.
    """

    def __init__(self, model: nn.Module, pool: EstimatorPool) -> None:
        self._model, self._pool = model, pool
        self.below: str | None = None
        self._watches = False
        self._consumers: Consumers | None = None
        self._lower: Cut | None = None
        self._notes = False
        self._hybrid = Hybrid()

    def take_part(self, below: str | None) -> None:
        """Become those of the stage above boundary `below`."""
        kinds = self._pool.kinds.items()
        asking = [name for name, kind in kinds if kind is not None and Signal.CONSUMER in kind.needs]
        self._watches, self.below = bool(asking), below if below in asking else None

    def attach(self, taps: Taps) -> None:
        """Have `taps` hook the layers, where any boundary's estimator asks for them."""
        if self._watches:
            taps.attach_layers(linear_layers(self._model), self._enter, self._leave)
            drop_compiled(self._model)

    def begin(self, received: Sequence[Tensor], probe: bool) -> None:
        """A training batch begins.

        Args:
            received: The leaves from the stage below.
            probe: Whether true gradients are measured.
        """
        self._consumers, self._lower, self._notes = None, None, self._watches
        if not self._watches:
            return
        self._consumers = Consumers(probe)
        if received and self.below is not None:
            self._lower = Cut(
                boundary=self.below,
                installed=self._pool.twin(self.below, received),
                outputs=[],
                leaves=list(received),
                stage=Stage([], []),
                factor=1.0,
                bp_lambda=1.0,
                waits=True,
                elements_unknown=False,
                awaited={Signal.CONSUMER},
            )

    def _owner_of(self, leaf: Tensor) -> Cut | None:
        if self._lower is None:
            return None
        return self._lower if any(leaf is each for each in self._lower.leaves) else None

    def _enter(self, name: str, layer: Layer, x: Tensor) -> Tensor | None:
        # in a backward pass too: a checkpoint runs again what it has run before
        if self._consumers is None or not torch.is_grad_enabled() or not x.requires_grad:
            return None
        reach = look_down([x], self._owner_of)
        for lower in reach.cuts:
            lower.awaited.discard(Signal.CONSUMER)
        return self._consumers.enter(name, layer, x, reach, self._notes)

    def _leave(self, name: str, layer: Layer, output: Tensor) -> Tensor | None:
        if self._consumers is None or not torch.is_grad_enabled():
            return None
        return self._consumers.leave(name, layer, output)

    def end_stage(self, outputs: Iterable[Tensor]) -> None:
        """The stage has come to its `outputs`, or to the loss.

        Raises:
            EstimatorError: No layer has read what came from below.
        """
        self._notes = False
        if self._consumers is None or self._lower is None:
            return
        reach = look_down(outputs, self._owner_of)
        self._consumers.end_stage(reach)
        if self._lower in reach.cuts:
            refuse_untold(self._lower)

    def speak_truly(self) -> None:
        """Have the layers' own vector-Jacobian products asked for from now on."""
        for swap in () if self._lower is None else self._lower.swaps:
            swap.exact = True

    def true_gradients(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """What the loss would have left below; nothing where it has left just that.

        Args:
            gradients: What it has left at what came from below.
        """
        lower = self._lower
        if lower is None:
            return ()
        if any(g is not None for g in gradients):
            pairs = zip(gradients, lower.leaves, strict=True)
            lower.arrived = [leaf.new_zeros(leaf.shape) if g is None else g for g, leaf in pairs]
        true = true_at_top(lower)
        return (None,) * len(gradients) if true is None else tuple(true)

    def describe(self) -> dict[str, object]:
        """Whether this stage has feedback alignment proper, where there is any."""
        return {"feedback_alignment": self._hybrid.describe()} if self._watches else {}

    def end(self) -> None:
        """The batch is over; say once what the gradient passes through unswapped."""
        if self._consumers is not None:
            self._hybrid.add(self._consumers.exact)
        self.forget()

    def forget(self) -> None:
        """Forget the batch in progress."""
        self._consumers = self._lower = None
