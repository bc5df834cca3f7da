"""The loss of every estimator that predicts the gradient itself."""

from collections.abc import Callable

from torch import Tensor

from lightning_dni.core.estimator import Feedback, Gradient, Record
from lightning_dni.core.target import sg_loss

Predict = Callable[[tuple[Tensor, ...], Tensor | None], Gradient]


def regression_loss(predict: Predict, record: Record, feedback: Feedback) -> Tensor:
    """SG loss of the prediction in `record`, which `predict` makes again where its graph was not kept."""
    assert feedback.target is not None
    prediction = record.gradient
    if prediction is None or not prediction[0].requires_grad:
        prediction = predict(record.h, record.context)
    return sg_loss(prediction, feedback.target, feedback.row_weights)
