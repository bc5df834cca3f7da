"""The loss of every estimator that predicts the gradient itself, and how it may reach the activation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dni.core.estimator import Feedback, Gradient, Lock, Record, rows_of
from lightning_dni.core.target import sg_loss
from lightning_dni.errors import EstimatorError

Predict = Callable[[tuple[Tensor, ...], Tensor | None], Gradient]


def regression_loss(predict: Predict, record: Record, feedback: Feedback) -> Tensor:
    """SG loss of the prediction in `record`, which `predict` makes again where its graph was not kept."""
    assert feedback.target is not None
    prediction = record.gradient
    if prediction is None or not prediction[0].requires_grad:
        prediction = predict(record.h, record.context)
    return sg_loss(prediction, feedback.target, feedback.row_weights)


def prop_locks(options: Mapping[str, Any]) -> frozenset[Lock]:
    """What the stage waits for under an estimator with these `options`: its target, with `prop_alpha`.

    Raises:
        EstimatorError: `prop_alpha` is negative, or no number.
    """
    alpha = options.get("prop_alpha", 0.0)
    if not isinstance(alpha, (int, float)) or not 0.0 <= alpha < float("inf"):
        raise EstimatorError(f"Expected `prop_alpha` to be a number of at least 0, but got {alpha!r}.")
    return frozenset({Lock.UPDATE, Lock.BACKWARD}) if alpha else frozenset()


def propagated(predict: Predict, record: Record, feedback: Feedback, alpha: float) -> Gradient | None:
    """SG(h, y) + alpha dL_SG/dh: the SG loss of every row reaches `h` (Czarnecki et al. 2017, section 6).

    Args:
        predict: Gives SG.
        record: What was seen and said.
        feedback: Holds the target.
        alpha: Weight of the SG loss; None is returned at 0.
    """
    if not alpha:
        return None
    assert feedback.target is not None
    with torch.enable_grad():
        h = tuple(leaf.detach().requires_grad_() for leaf in record.h)
        said = predict(h, record.context)
        loss = sg_loss(said, feedback.target, feedback.row_weights) * rows_of(h)
        reached = torch.autograd.grad(loss, h)
    return tuple(s.detach() + alpha * r for s, r in zip(said, reached, strict=True))
