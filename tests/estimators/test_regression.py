"""The loss of regressors: from the graph that was kept, or from a prediction made again."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_dni.core import Feedback, Record
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators.regression import prop_locks, regression_loss


def test_predicts_again_only_where_no_graph_was_kept():
    linear, calls = nn.Linear(5, 5), []

    def predict(h, context):
        calls.append(context)
        return (linear(h[0]),)

    h, target = torch.randn(6, 5), torch.randn(6, 5)
    kept = linear(h)
    losses = [
        regression_loss(predict, Record((h,), None, gradient, None), Feedback(target=(target,)))
        for gradient in ((kept,), (kept.detach(),), None)
    ]
    assert len(calls) == 2
    assert_close(losses[0], ((kept - target) ** 2).sum(1).mean())
    assert_close(losses[1:], losses[:-1])


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan"), "much"])
def test_an_alpha_that_is_no_weight_is_refused(alpha):
    with pytest.raises(EstimatorError, match=r"Expected `prop_alpha` to be a number of at least 0, but got"):
        prop_locks({"prop_alpha": alpha})
