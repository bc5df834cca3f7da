"""Linear and logistic regression on a linear synthetic gradient at the output: Theorem 1, and its limits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lightning_dni.analysis.linear import LinearMap, fit_linear_map

LossName = Literal["mse", "log"]
Teacher = Literal["synthetic", "true"]
SGSteps = int | Literal["converged"]

SMALLEST_RATE = 2.0**-50
"""The net stands still for an iteration in which no larger rate, relative to the first, is small enough."""


def row_losses(
    p: Float[Tensor, "rows outputs"], y: Float[Tensor, "rows outputs"], loss: LossName
) -> Float[Tensor, " rows"]:
    """The loss of each row: half the squared distance ("mse"), or binary cross-entropy of scores ("log")."""
    if loss == "mse":
        return (p - y).square().sum(1) / 2
    return F.binary_cross_entropy_with_logits(p, y, reduction="none").sum(1)


def output_gradient(
    p: Float[Tensor, "rows outputs"], y: Float[Tensor, "rows outputs"], loss: LossName
) -> Float[Tensor, "rows outputs"]:
    """Derivative of the summed `row_losses` with respect to `p`."""
    return p - y if loss == "mse" else torch.sigmoid(p) - y


@dataclass(frozen=True)
class RegressionRun:
    """A finished run; the first entries of its curves are of the start.

    Attributes:
        weight: W of p = xW + b, `[features, outputs]`.
        bias: b, `[outputs]`.
        synthesizer: The synthetic gradient.
        losses: Mean loss of a row, `[steps + 1]`.
        sg_errors: Root mean square over rows of the distance of synthetic and true gradient, `[steps + 1]`.
        network_errors: The same of the outputs' distance to those of the global solution, `[steps + 1]`; None
            for the log loss, for which there is no closed form.
        rates: Learning rates of the net, `[steps]`.
    """

    weight: Float[Tensor, "features outputs"]
    bias: Float[Tensor, " outputs"]
    synthesizer: LinearMap
    losses: Float[Tensor, " points"]
    sg_errors: Float[Tensor, " points"]
    network_errors: Float[Tensor, " points"] | None
    rates: Float[Tensor, " steps"]

    @property
    def error_sums(self) -> Float[Tensor, " points"]:
        """Network error and SG error added up: what decreases in every iteration of Theorem 1's proof.

        Raises:
            ValueError: The run has no network errors.
        """
        if self.network_errors is None:
            raise ValueError(
                "Expected a run on the squared error, but got one on the log loss, whose global solution has "
                "no closed form. Pass loss='mse'."
            )
        return self.network_errors + self.sg_errors


def regress(
    x: Float[Tensor, "rows features"],
    y: Float[Tensor, "rows outputs"],
    *,
    loss: LossName = "mse",
    teacher: Teacher = "synthetic",
    steps: int = 6000,
    learning_rate: float = 0.1,
    sg_steps: SGSteps = 1,
    guarded: bool = False,
    start: LinearMap | None = None,
    on_step: Callable[[int, LinearMap], None] | None = None,
) -> RegressionRun:
    """Full-batch descent of p = xW + b from zero on SG(p, y) = pA + yB + C (section 4, Theorem 1).

    In every iteration the synthetic gradient takes `sg_steps` steps of steepest descent on its loss, each
    with exact line search; then the net takes one step on what it says. `sg_steps` is the tracking rate:
    0 is a frozen synthetic gradient, "converged" the best linear one at these rows, which for the squared
    error is the true gradient, hence backprop.

    Args:
        x: Inputs.
        y: Targets; 0 or 1 for the log loss.
        loss: See `row_losses`.
        teacher: "true" for backprop.
        steps: Number of iterations.
        learning_rate: The net's.
        sg_steps: Steps of the synthetic gradient in each of them.
        guarded: Halve the net's rate until the sum of network and SG error decreases: the "small enough
            positive learning rate" of Theorem 1. It exists as long as the SG error is not stationary.
        start: The synthetic gradient at first; None for zero.
        on_step: Called before every iteration with its number and the synthetic gradient.

    Raises:
        ValueError: An option is none of those, or the rate is guarded on the log loss.
    """
    _check(loss, teacher, sg_steps, guarded)
    run = _Regression(x, y, loss, start or LinearMap.zeros(y.shape[1], y.shape[1], x.dtype))
    run.note()
    for step in range(steps):
        if on_step is not None:
            on_step(step, run.synthesizer)
        before = run.errors[-1] if guarded else None
        if teacher == "synthetic":
            run.improve(sg_steps)
        run.descend(learning_rate, teacher, before)
        run.note()
    return run.finish()


class _Regression:
    """The state of a run, and its two kinds of steps."""

    def __init__(self, x: Tensor, y: Tensor, loss: LossName, start: LinearMap) -> None:
        self._x, self._y, self._loss = x, y, loss
        self._ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self._theta = x.new_zeros(x.shape[1] + 1, y.shape[1])
        self._best = self._ones @ (torch.linalg.pinv(self._ones) @ y) if loss == "mse" else None
        self._p = self._ones @ self._theta
        self._map = torch.cat([*start[:2], start.C.unsqueeze(0)])
        self.errors: list[float] = []
        self._curves: list[Tensor] = []
        self._rates: list[float] = []

    @property
    def synthesizer(self) -> LinearMap:
        """The synthetic gradient as it is now."""
        width = self._y.shape[1]
        a, b, c = torch.split_with_sizes(self._map, [width, width, 1])
        return LinearMap(a, b, c[0])

    def note(self) -> None:
        """Add where the run is to its curves."""
        loss = row_losses(self._p, self._y, self._loss).mean()
        network, sg = self._errors(self._p)
        self._curves.append(torch.stack([loss, network, sg]))
        self.errors.append(float(network + sg))

    def improve(self, steps: SGSteps) -> None:
        """Let the synthetic gradient follow the true one at the present outputs."""
        gradient = output_gradient(self._p, self._y, self._loss)
        if steps == "converged":
            fitted = fit_linear_map(self._p, self._y, gradient)
            self._map = torch.cat([*fitted[:2], fitted.C.unsqueeze(0)])
            return
        z = self._inputs(self._p)
        for _ in range(steps):
            direction = z.t() @ (z @ self._map - gradient)
            along = (z @ direction).square().sum()
            if along > 0:
                self._map = self._map - direction * (direction.square().sum() / along)

    def descend(self, rate: float, teacher: Teacher, before: float | None) -> None:
        """Take one step of the net, with a rate under which the errors add up to less than `before`."""
        true = output_gradient(self._p, self._y, self._loss)
        given = true if teacher == "true" else self._inputs(self._p) @ self._map
        direction = self._ones.t() @ given / len(given)
        change = self._ones @ direction
        least = rate * SMALLEST_RATE
        while before is not None and rate and float(sum(self._errors(self._p - rate * change))) >= before:
            rate = rate / 2 if rate > least else 0.0
        self._theta = self._theta - rate * direction
        self._p = self._ones @ self._theta
        self._rates.append(rate)

    def _inputs(self, p: Tensor) -> Tensor:
        return torch.cat([p, self._y, p.new_ones(len(p), 1)], dim=1)

    def _errors(self, p: Tensor) -> tuple[Tensor, Tensor]:
        distance = self._inputs(p) @ self._map - output_gradient(p, self._y, self._loss)
        away = p.new_zeros(1, 1) if self._best is None else p - self._best
        return tuple(each.square().sum(1).mean().sqrt() for each in (away, distance))  # type: ignore[return-value]

    def finish(self) -> RegressionRun:
        """The run as it ended."""
        losses, network, sg = torch.stack(self._curves, dim=1)
        return RegressionRun(
            weight=self._theta[:-1],
            bias=self._theta[-1],
            synthesizer=self.synthesizer,
            losses=losses,
            sg_errors=sg,
            network_errors=None if self._best is None else network,
            rates=self._x.new_tensor(self._rates),
        )


def _check(loss: LossName, teacher: Teacher, sg_steps: SGSteps, guarded: bool) -> None:
    for name, value, choices in (("loss", loss, LossName), ("teacher", teacher, Teacher)):
        if value not in get_args(choices):
            raise ValueError(
                f"Expected `{name}` to be one of {get_args(choices)}, but got {value!r}. Choose one of them."
            )
    if sg_steps != "converged" and (not isinstance(sg_steps, int) or sg_steps < 0):
        raise ValueError(
            f"Expected `sg_steps` to be 'converged' or an integer of at least 0, but got {sg_steps!r}. Pass "
            "0 for a frozen synthetic gradient."
        )
    if guarded and loss != "mse":
        raise ValueError(
            f"Expected the squared error where the rate is guarded, but got loss={loss!r}, whose network "
            "error is not known. Pass guarded=False."
        )
