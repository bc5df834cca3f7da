"""The loss that an estimator implements, and the true one, over a plane of inputs (section 5).

The stage below descends whatever loss has the synthetic gradient as its derivative. Integrating the estimator
finds it, but for a constant for each label; so surfaces are compared within each class, by correlation.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.analysis.field import GradientField
from lightning_dni.analysis.linear import LinearMap
from lightning_dni.core import GradientEstimator
from lightning_dni.core.boundary import named_submodules
from lightning_dni.core.distance import cosine_of, cosine_sums
from lightning_dni.core.randomness import seeded
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator

Losses = Callable[[Tensor, Tensor], Tensor]
"""The loss of every row `[rows]`, from the network's output and labels `[rows]`."""


def quadratic_loss(
    synthesizer: LinearMap, h: Float[Tensor, "rows features"], y: Float[Tensor, "rows labels"]
) -> Float[Tensor, " rows"]:
    """What a linear synthetic gradient implements: half h A h^T + (yB + C) h^T, zero at h = 0.

    A counts through its symmetric part alone; the rest is a curl, which no loss has, and does no work along
    a straight way from zero.

    Args:
        synthesizer: The linear map.
        h: Activations.
        y: Labels as vectors.
    """
    quadratic = ((h @ synthesizer.A) * h).sum(1) / 2
    return quadratic + ((y @ synthesizer.B + synthesizer.C) * h).sum(1)


def implicit_loss(
    field: GradientField,
    h: Float[Tensor, " rows *features"],
    context: Tensor | None = None,
    start: Float[Tensor, " *features"] | None = None,
    points: int = 65,
) -> Float[Tensor, " rows"]:
    """What any estimator implements: its work along the straight way from `start` to each row, trapezoids.

    Exact where the field is linear. Where it has a curl the value depends on the way.

    Args:
        field: The estimator's field.
        h: Where the ways end.
        context: What the estimator is told about each row, all the way.
        start: Where they begin; None: at zero.
        points: At which the field is evaluated, ends included.
    """
    end = h.detach().cpu().double()
    begin = torch.zeros_like(end[:1]) if start is None else start.detach().cpu().double().unsqueeze(0)
    way, total = end - begin, end.new_zeros(len(end))
    for k, t in enumerate(torch.linspace(0, 1, points, dtype=torch.float64)):
        work = (field(begin + t * way, context) * way).flatten(1).sum(1)
        total = total + work * (0.5 if k in (0, points - 1) else 1.0)
    return total / (points - 1)


class LossSurfaces(NamedTuple):
    """Losses over a plane of inputs, for every label.

    Attributes:
        points: The inputs, `[points, 2]`.
        true: The network's loss, `[classes, points]`; None where it is not known.
        implicit: What the estimators implement, by boundary, of the same shape; free up to a constant for
            each class.
    """

    points: Tensor
    true: Tensor | None
    implicit: Mapping[str, Tensor]

    def correlations(self) -> dict[str, Tensor]:
        """Correlation of implicit and true loss over the points, within each class `[classes]`, by boundary.

        Raises:
            ValueError: The true loss is not known.
        """
        if self.true is None:
            raise ValueError("Expected the true loss, but got None. Pass `losses` to `loss_surfaces`.")
        centered = self.true - self.true.mean(1, keepdim=True)
        return {
            name: torch.stack(
                [cosine_of(*cosine_sums(i - i.mean(), t)) for i, t in zip(found, centered, strict=True)]
            )
            for name, found in self.implicit.items()
        }


def plane(low: tuple[float, float], high: tuple[float, float], side: int = 20) -> Float[Tensor, "points 2"]:
    """A grid of `side` x `side` inputs between two corners, the second input changing fastest."""
    axes = [torch.linspace(a, b, side) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes)


@torch.no_grad()
def loss_surfaces(
    model: nn.Module,
    estimators: Mapping[str, GradientEstimator],
    points: Float[Tensor, "points 2"],
    num_classes: int,
    losses: Losses | None = None,
) -> LossSurfaces:
    """The true loss over a plane of inputs, and the one that each estimator implements there.

    In closed form for `LinearEstimator` on vectors (`quadratic_loss`, of A's symmetric part alone); for any
    other as a path integral from the mean activation, which holds the work of its curl on that way, too.
    The network runs in evaluation mode and is left as it was.

    Args:
        model: Gives the network's output for inputs.
        estimators: By boundary; each told labels.
        points: The inputs.
        num_classes: Every point is taken with each of so many labels.
        losses: The true loss; None: not known.

    Raises:
        BoundaryError: A boundary did not run, or more than once, or more than one tensor crosses it.
    """
    output, activations = _run(model, list(estimators), points)
    labels = [torch.full((len(points),), k) for k in range(num_classes)]
    true = None
    if losses is not None:
        true = torch.stack([losses(output, y.to(output.device)).cpu().double() for y in labels])
    implicit = {
        name: _implicit_surfaces(estimator, activations[name], labels)
        for name, estimator in estimators.items()
    }
    return LossSurfaces(points.cpu().double(), true, implicit)


def _implicit_surfaces(estimator: GradientEstimator, h: Tensor, labels: list[Tensor]) -> Tensor:
    classes = estimator.num_classes or 0
    if isinstance(estimator, LinearEstimator) and h.ndim == 2 and estimator.context_size is None:
        synthesizer = LinearMap(*(each.cpu().double() for each in LinearMap.of(estimator)))
        vectors = [F.one_hot(y, classes) if classes else y.new_zeros(len(y), 0) for y in labels]
        return torch.stack([quadratic_loss(synthesizer, h.cpu().double(), y.double()) for y in vectors])
    field, center = GradientField(estimator), h.mean(0)  # a way from there stays near where it has learnt
    told = labels if classes else [None] * len(labels)
    return torch.stack([implicit_loss(field, h, context, center) for context in told])


def _run(model: nn.Module, names: list[str], points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and what crosses each boundary, in evaluation mode, without a trace."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = named_submodules(model)
    handles = [
        modules[name].register_forward_hook(lambda _, __, h, kept=seen[name]: kept.append(h))
        for name in names
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with seeded(0, points.device):
            output = model(points)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    strange = [n for n, found in seen.items() if len(found) != 1 or not isinstance(found[0], Tensor)]
    if strange:
        raise BoundaryError(
            f"Expected one tensor to cross each boundary once for a plane of inputs, but got something else "
            f"at {strange}. Leave these out."
        )
    return output, {name: found[0] for name, found in seen.items()}
