"""Labels of padding: zero gradient there, nothing learnt from it, whatever stands there."""

from functools import partial

import pytest
import torch
from tables import CLASSES, SHAPES, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator, LowRankEstimator, MLPEstimator

PADDING = -100
SPEC = BoundarySpec("net.1", (LeafSpec(SHAPES["sequence"][0], torch.float32),))
MAKES = {
    "linear": LinearEstimator,
    "mlp": partial(MLPEstimator, hidden_sizes=(7,), batch_norm=False),
    "low_rank": partial(LowRankEstimator, rank=3),
}
each_kind = pytest.mark.parametrize(
    "make", [pytest.param(partial(make, num_classes=CLASSES), id=name) for name, make in MAKES.items()]
)


def stirred(make, **options):
    torch.manual_seed(1)
    estimator = make(SPEC, **options).double()
    for p in estimator.parameters():
        p.data += 0.3 * torch.randn(p.shape).double()
    return estimator


def gradients(estimator, h, labels, target):
    """By autograd, and by hand where the estimator has them."""
    estimator.zero_grad()
    record = record_of(estimator, (h,), labels)
    estimator.loss(record, Feedback(target=(target,))).backward()
    found = {n: p.grad.clone() for n, p in estimator.named_parameters()}
    if estimator.differentiates:
        made = dict(
            estimator.parameter_gradients(record, (record.gradient[0].detach() - target,), 2.0 / len(h))
        )
        for n, p in estimator.named_parameters():
            assert_close(made[p], found[n], rtol=0, atol=1e-10)
    return record.gradient[0].detach(), found


@each_kind
def test_padded_sequences_are_the_short_ones(make):
    """Gradients for positions and for parameters are those of sequences without what was appended."""
    h, target = torch.randn(6, 4, 5).double(), torch.randn(6, 4, 5).double()
    labels = torch.randint(CLASSES, (6, 4))
    said, learnt = gradients(stirred(make), h[:, :3], labels[:, :3], target[:, :3])
    labels[:, 3] = PADDING
    padded, again = gradients(stirred(make, ignore_index=PADDING), h, labels, target)
    assert_close(padded[:, :3], said, rtol=0, atol=1e-10)
    assert not padded[:, 3].any()
    assert_close(again, learnt, rtol=0, atol=1e-10)


@each_kind
def test_a_padded_row_is_no_row(make):
    """One label for a whole sample works the same way."""
    h, labels = torch.randn(6, 4, 5).double(), torch.tensor([0, 1, PADDING, 2, 1, PADDING])
    said, _ = gradients(stirred(make, ignore_index=PADDING), h, labels, torch.randn(6, 4, 5).double())
    assert said.flatten(1).any(1).tolist() == [True, True, False, True, True, False]


@each_kind
def test_an_engine_takes_labels_of_padding(make):
    """Also as torch's cross-entropy ignores them; without `ignore_index` they are refused."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    x, labels = torch.randn(8, 4, 6), torch.randint(CLASSES, (8, 4))
    labels[:, 2:] = PADDING

    def step(**options):
        engine = DNIEngine(model, ["1"], partial(make, **options), labels=1)
        with engine:
            for _ in range(2):
                model.zero_grad()
                with engine.training_step((x, labels)):
                    loss = F.cross_entropy(model(x).flatten(0, 1), labels.flatten())
                engine.backward(loss)
                engine.update_estimators()

    step(ignore_index=PADDING)
    assert model[0].weight.grad.isfinite().all()
    with pytest.raises(EstimatorError, match=r"from -100 to 2.* take `ignore_index`"):
        step()
    labels[0, 0] = CLASSES
    with pytest.raises(EstimatorError, match=r"in \[0, 3\) .* but got values from 0 to 3"):
        step(ignore_index=PADDING)


@pytest.mark.parametrize("kind", MAKES)
def test_padding_needs_labels(kind):
    with pytest.raises(EstimatorError, match=r"`num_classes` with `ignore_index` for boundary 'net.1'"):
        MAKES[kind](SPEC, ignore_index=PADDING)


def test_batch_norm_would_count_padding():
    with pytest.raises(
        EstimatorError, match="`batch_norm` to be False with `ignore_index` for MLPEstimator at bo"
    ):
        MLPEstimator(SPEC, num_classes=CLASSES, ignore_index=PADDING)
