"""The linear synthetic gradient hA + yB + C: fitted, read off an estimator, and in closed form."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator


class LinearMap(NamedTuple):
    """SG(h, y) = hA + yB + C, rows of `h` and `y` from the left (Czarnecki et al. 2017, section 2).

    Attributes:
        A: What `h` is multiplied with, `[features, features]`.
        B: What the labels are multiplied with, `[labels, features]`; without rows where there are none.
        C: What is added, `[features]`.
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def __call__(
        self, h: Float[Tensor, "rows features"], y: Float[Tensor, "rows labels"]
    ) -> Float[Tensor, "rows features"]:
        """The synthetic gradient at `h`, given labels `y`."""
        return h @ self.A + y @ self.B + self.C

    @classmethod
    def zeros(cls, features: int, labels: int, dtype: torch.dtype = torch.float64) -> "LinearMap":
        """The map that says zero, with which every estimator starts."""
        return cls(
            torch.zeros(features, features, dtype=dtype),
            torch.zeros(labels, features, dtype=dtype),
            torch.zeros(features, dtype=dtype),
        )

    @classmethod
    def of(cls, estimator: LinearEstimator) -> "LinearMap":
        """What `estimator` has learnt so far, copied."""
        weight, bias = estimator.map.weight.detach(), estimator.map.bias.detach()
        labels = estimator.conditioning.weight
        return cls(
            weight.t().clone(),
            bias.new_zeros(0, len(bias)) if labels is None else labels.detach().clone(),
            bias.clone(),
        )


def fit_linear_map(
    h: Float[Tensor, "rows features"],
    y: Float[Tensor, "rows labels"],
    gradient: Float[Tensor, "rows features"],
) -> LinearMap:
    """The linear map nearest to `gradient` at these rows: least squares, the smallest of all solutions.

    Args:
        h: Activations.
        y: Labels as vectors, one-hot or continuous; of width zero for none.
        gradient: The gradient to represent.

    Example:
        >>> h, y = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
        >>> fitted = fit_linear_map(h, y, h - y)
        >>> all(torch.allclose(a, b) for a, b in zip(fitted, squared_error_map(2)))
        True
    """
    z = torch.cat([h, y, h.new_ones(len(h), 1)], dim=1)
    found = torch.linalg.pinv(z) @ gradient  # the labels and the constant are often dependent
    a, b, c = torch.split_with_sizes(found, [h.shape[1], y.shape[1], 1])
    return LinearMap(a, b, c[0])


# ---- closed forms, derived; p is the network's output, L the loss of one row


def squared_error_map(features: int, dtype: torch.dtype = torch.float64) -> LinearMap:
    """Exact at `p` for L = half the squared distance of `p` to `y`: A = I, B = -I, C = 0."""
    eye = torch.eye(features, dtype=dtype)
    return LinearMap(eye, -eye, torch.zeros(features, dtype=dtype))


def squared_error_map_below(
    weight: Float[Tensor, "features outputs"], bias: Float[Tensor, " outputs"]
) -> LinearMap:
    """Exact at `h` below p = hW + b for the same loss: A = W W^T, B = -W^T, C = b W^T.

    Args:
        weight: W, the product of all upper layers.
        bias: b.
    """
    return LinearMap(weight @ weight.t(), -weight.t(), bias @ weight.t())


def log_loss_map(dtype: torch.dtype = torch.float64) -> LinearMap:
    """To first order at p = 0 for the binary log loss, whose derivative is sigmoid(p) - y: 1/4, -1, 1/2."""
    one = torch.ones(1, 1, dtype=dtype)
    return LinearMap(one / 4, -one, one[0] / 2)


def softmax_map(num_classes: int, dtype: torch.dtype = torch.float64) -> LinearMap:
    """To first order at p = 0 for softmax cross-entropy: A = (I - 11^T / K) / K, B = -I, C = 1 / K.

    Raises:
        EstimatorError: There are fewer than two classes.
    """
    if num_classes < 2:
        raise EstimatorError(
            f"Expected `num_classes` to be at least 2, but got {num_classes}. One class has nothing to learn."
        )
    k, eye = num_classes, torch.eye(num_classes, dtype=dtype)
    return LinearMap((eye - 1 / k) / k, -eye, torch.full((k,), 1 / k, dtype=dtype))
