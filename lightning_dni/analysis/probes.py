"""How well a linear classifier tells the classes apart from what a layer gives (section 5 of the paper)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LinearProbe:
    """A fitted multinomial logistic regression.

    Attributes:
        weight: One row per class, for standardized features.
        bias: One per class.
        mean: Subtracted from the features.
        scale: The features are divided by it.
    """

    weight: Float64[Tensor, " classes features"]
    bias: Float64[Tensor, " classes"]
    mean: Float64[Tensor, " features"]
    scale: Float64[Tensor, " features"]

    def logits(self, rows: Float[Tensor, " samples features"]) -> Float64[Tensor, " samples classes"]:
        """Class scores."""
        return F.linear((rows.double() - self.mean) / self.scale, self.weight, self.bias)

    def accuracy(self, rows: Float[Tensor, " samples features"], labels: Int64[Tensor, " samples"]) -> float:
        """Share of `rows` whose highest score is that of their class."""
        return float((self.logits(rows).argmax(1) == labels).double().mean())


# labels are annotated apart from rows: another length is refused by `_check`, which says more


def fit_probe(
    rows: Float[Tensor, " samples features"],
    labels: Int64[Tensor, " labels"],
    num_classes: int | None = None,
    penalty: float = 1e-3,
    max_iterations: int = 500,
) -> LinearProbe:
    """Fit a logistic regression by L-BFGS, from zero; it draws no random number.

    It minimizes the mean cross-entropy plus half the `penalty` times the squared norm of the weights, on
    features of mean 0 and variance 1; a feature that never changes is left at 0.

    Args:
        rows: What the layer gives for each training sample.
        labels: Their classes.
        num_classes: Number of classes; None: as many as the labels say.
        penalty: Makes the solution unique where the classes can be told apart without an error.
        max_iterations: At most so many steps.

    Raises:
        ValueError: `rows` is not finite or of another length than `labels`, or `penalty` is not above 0.
    """
    _check(rows, labels, penalty)
    x = rows.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    # what is left of a constant feature is rounding
    scale = torch.where(scale <= 1e-10 * x.abs().amax(0), torch.inf, scale)
    x = (x - mean) / scale
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    truth = F.one_hot(labels, classes).double()
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> float:
        logits = F.linear(x, weight, bias)
        slope = (logits.softmax(1) - truth) / len(x)
        weight.grad, bias.grad = slope.T @ x + penalty * weight, slope.sum(0)
        loss = F.cross_entropy(logits, labels) + 0.5 * penalty * weight.square().sum()
        return float(loss)

    step: Callable[[Callable[[], float]], object] = optimizer.step
    with torch.no_grad():
        step(evaluate)
    weight.grad = bias.grad = None
    return LinearProbe(weight, bias, mean, scale)


def _check(rows: Tensor, labels: Tensor, penalty: float) -> None:
    if len(rows) != len(labels) or not len(rows):
        raise ValueError(
            f"Expected `labels` to be one for each of {len(rows)} rows, at least one, but got {len(labels)}."
        )
    if not rows.isfinite().all():
        raise ValueError(
            "Expected `rows` to be finite, but got an infinity or a NaN. Look at the training run: the layer "
            "has diverged."
        )
    if not penalty > 0:
        raise ValueError(f"Expected `penalty` to be above 0, but got {penalty!r}. Pass a small one.")
