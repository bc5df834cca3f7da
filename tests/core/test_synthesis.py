"""An estimator is asked in its own precision, its own stream, and with the graph that it needs."""

import pytest
import torch
from core.nets import Told
from torch import nn

from lightning_dni.core import BoundarySpec, Feedback, Record
from lightning_dni.core.estimator import Installed
from lightning_dni.core.randomness import RandomStream
from lightning_dni.core.synthesis import estimating, learn, observed

H = torch.randn(4, 3)


def installed(stream=None):
    return Installed(Told(BoundarySpec.of("b", [H])), (), stream)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("stream", [None, RandomStream(1, torch.device("cpu"))])
def test_precision_graph_and_generator_are_set_and_put_back(grad, autocast, stream):
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with estimating(installed(stream), H, grad):
            assert torch.is_grad_enabled() == grad
            assert (H @ H.T).dtype == torch.float32
            if stream is not None:
                torch.rand(1)
        assert torch.is_autocast_enabled("cpu") == autocast
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


class Learner(Told):
    def __init__(self, spec):
        super().__init__(spec)
        self.weight = nn.Parameter(torch.ones(()))

    def loss(self, record, feedback):
        return self.weight * feedback.target[0].sum()


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_forward_pass_teaches_by_its_share(share):
    learner = Learner(BoundarySpec.of("b", [H]))
    record = Record((H,), None, None, None)
    with torch.no_grad():
        loss = learn(Installed(learner, (learner.weight,)), record, Feedback(target=(H,)), share)
    loss.backward()
    torch.testing.assert_close(learner.weight.grad, H.sum() * share)


def test_what_learns_nothing_has_no_loss():
    assert learn(installed(), Record((H,), None, None, None), Feedback(), 0.5) is None


def test_what_is_observed_is_finite_where_everything_is():
    assert observed((H, H[:2])).isfinite()
    assert not observed((H, H * float("nan"))).isfinite()
