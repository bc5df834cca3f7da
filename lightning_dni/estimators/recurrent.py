"""An estimator that is itself recurrent, from chunk to chunk, and may look one chunk further ahead."""

from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Facts, Feedback, Gradient, GradientEstimator, Record, Signal, who
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, split
from lightning_dni.estimators.layers import check_sizes, start_at_zero


@final
class RecurrentEstimator(GradientEstimator):
    """A GRU reads `h` at the end of every chunk; a linear layer that starts at exactly zero gives SG.

    At a truncation its own state goes on with the sequences and begins at zero with new ones; its gradient
    ends at the beginning of the chunk. At a boundary it begins at zero in every step.

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map. Several leaves
            are one `h`, laid side by side.
        hidden_size: Width of the GRU.
        future_weight: Weight of the auxiliary task, at truncations only: another linear layer predicts the
            synthetic gradient at the end of the next chunk (Jaderberg et al. 2017, section 3.1).
        num_classes: Number of classes where labels are the context; they are added to what the GRU reads.
        context_size: Width of a continuous context, likewise.

    Raises:
        EstimatorError: A width or weight is out of its range, or the spec or a context does not fit.
    """

    needs = frozenset({Signal.TARGET})
    regresses = True
    keeps_graph = False
    facts = Facts(
        gradient="SG(h, y)",
        synthesis="GRU over the h and y of a sequence's chunks",
        target="dL/dh",
        loss="squared distance",
    )

    def __init__(
        self,
        spec: BoundarySpec,
        hidden_size: int = 64,
        future_weight: float = 0.0,
        num_classes: int | None = None,
        context_size: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes("hidden_size", [hidden_size])
        if not 0.0 <= future_weight < float("inf"):
            raise EstimatorError(
                f"Expected `future_weight` to be a number of at least 0, but got {future_weight!r}."
            )
        self.num_classes, self.context_size = num_classes, context_size
        self.future_weight, self._who = float(future_weight), who(self, spec.name)
        width = joint_width(spec)
        self.read = nn.Linear(width, hidden_size)
        self.conditioning = Conditioning(spec, hidden_size, num_classes, context_size, zero=False)
        self.cell = nn.GRUCell(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, width)
        self.future = nn.Linear(hidden_size, width) if future_weight else None
        for head in (self.head, self.future):
            if head is not None:
                start_at_zero(head)

    def _remember(self, h: tuple[Tensor, ...], context: Tensor | None, before: Tensor) -> Tensor:
        """The state after `h`, `[batch, ..., hidden]`, from that of the chunk before."""
        read: Tensor = self.read(join(h))
        added = self.conditioning(context, read)
        read = F.relu(read if added is None else read + added)
        after: Tensor = self.cell(read.flatten(0, -2), before.flatten(0, -2))
        return after.view_as(before)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The prediction, and the state after and before it."""
        size = (*h[0].shape[:-1], self.cell.hidden_size)
        before: Tensor = h[0].new_zeros(size) if state is None else state[0]
        after = self._remember(h, context, before)
        return split(self.head(after), h), (after.detach(), before)

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss, and `future_weight` times that of the synthetic gradient one chunk later.

        Raises:
            EstimatorError: There is no chunk, and the auxiliary task is asked for.
        """
        assert feedback.target is not None
        after = self._remember(record.h, record.context, record.state[1])
        said = split(self.head(after), record.h)
        loss = sg_loss(said, feedback.target, feedback.row_weights)
        if self.future is None:
            return loss
        if feedback.future is None:
            raise EstimatorError(
                f"Expected a truncation for {self._who} with future_weight={self.future_weight}, but got a "
                "boundary, where no chunk follows. Leave `future_weight` out."
            )
        foreseen = split(self.future(after), record.h)
        return loss + self.future_weight * sg_loss(foreseen, feedback.future, feedback.row_weights)
