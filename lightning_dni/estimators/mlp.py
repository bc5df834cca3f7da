"""The multilayer estimator of Jaderberg et al. 2017, appendix C."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.boundary import BoundarySpec
from lightning_dni.core.estimator import Feedback, Gradient, GradientEstimator, Record, Signal
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.conditioning import Conditioning, join, joint_width, split
from lightning_dni.estimators.normalization import BatchNorm


@final
class MLPEstimator(GradientEstimator):
    """Hidden layers (linear, batch norm, ReLU), then a linear layer that starts at exactly zero.

    Its graph costs more than `h` and is built again for the loss.

    Args:
        spec: The boundary's spec; `h` is `[batch, ..., features]`, positions share the map.
        hidden_sizes: Widths of the hidden layers.
        batch_norm: Whether hidden layers are normalized.
        num_classes: Number of classes where labels are the context; they enter the first layer.
        context_size: Width of a continuous context.

    Raises:
        EstimatorError: A width is not positive, or the spec or context does not fit.
    """

    needs = frozenset({Signal.TARGET})
    keeps_graph = False

    def __init__(
        self,
        spec: BoundarySpec,
        hidden_sizes: Sequence[int] = (1024, 1024),
        batch_norm: bool = True,
        num_classes: int | None = None,
        context_size: int | None = None,
    ) -> None:
        super().__init__()
        check_widths("hidden_sizes", hidden_sizes)
        self.num_classes, self.context_size = num_classes, context_size
        width = joint_width(spec)
        sizes = [width, *hidden_sizes, width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(
            BatchNorm(size, feature_dim=-1) if batch_norm else nn.Identity() for size in hidden_sizes
        )
        self.conditioning = Conditioning(sizes[1], num_classes, context_size)
        start_at_zero(self.layers[-1])

    def _predict(self, h: tuple[Tensor, ...], context: Tensor | None) -> Gradient:
        x = self.conditioning(self.layers[0](join(h)), context)
        for norm, layer in zip(self.norms, list(self.layers)[1:], strict=True):
            x = layer(F.relu(norm(x)))
        return split(x, h)

    def synthesize(
        self, h: tuple[Tensor, ...], context: Tensor | None, state: Any
    ) -> tuple[Gradient | None, Any]:
        """The network's prediction."""
        return self._predict(h, context), None

    def loss(self, record: Record, feedback: Feedback) -> Tensor | None:
        """SG loss: squared distance to the target per row, averaged over rows."""
        assert feedback.target is not None
        return sg_loss(self._predict(record.h, record.context), feedback.target, feedback.row_weights)


def check_widths(argument: str, widths: Sequence[int]) -> None:
    """Refuse widths below one.

    Raises:
        EstimatorError: A width is below one.
    """
    if any(width < 1 for width in widths):
        raise EstimatorError(f"Expected `{argument}` to be positive, but got {tuple(widths)}.")


def start_at_zero(layer: nn.Module) -> None:
    """Set weight and bias to zero, so that the estimator starts at exactly zero output."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
