"""An estimator as a field: its derivative against autograd, its curl and curvature in known cases."""

import copy

import pytest
import torch
from tables import ESTIMATORS, each
from torch import nn
from torch.testing import assert_close

from lightning_dni.analysis import GradientField, conservation, conservation_of
from lightning_dni.core import BoundarySpec, GradientEstimator, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import CriticEstimator, LinearEstimator, LocalLossEstimator, MLPEstimator
from lightning_dni.estimators.normalization import BatchNorm

SINGLE = [row for row in ESTIMATORS if row.kind != "leaves" and "similarity" not in row.id]
"""Without what compares the rows of a batch with each other: no row of it has a gradient by itself."""
SPEC = BoundarySpec("h", (LeafSpec((3,), torch.float32),))


@each(SINGLE)
def test_the_field_says_what_the_estimator_says_of_a_row_alone(row):
    estimator = row.stirred()
    h, context, _ = row.sample()
    before = {n: t.clone() for n, t in estimator.state_dict().items()}
    rng = torch.get_rng_state()
    found = GradientField(estimator)(h[0], context)
    twin = copy.deepcopy(estimator).double()
    told = context.double() if row.context.endswith("vectors") else context
    for module in twin.modules():
        if isinstance(module, BatchNorm) and row.kind != "vector":  # a row's positions have statistics
            module.frozen = True
    for k in range(len(h[0])):
        one = slice(k, k + 1)
        said, _ = twin.synthesize((h[0][one].double(),), None if told is None else told[one], None)
        expected = torch.zeros_like(found[one]) if said is None else said[0].detach()
        assert_close(found[one], expected, rtol=0, atol=1e-12)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in estimator.state_dict().items())
    assert all(not getattr(m, "frozen", False) for m in estimator.modules())


def test_the_derivative_is_autograds():
    torch.manual_seed(0)
    estimator = MLPEstimator(SPEC, hidden_sizes=(8,), batch_norm=False, num_classes=2)
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    h, labels = torch.randn(5, 3), torch.arange(5) % 2
    found = GradientField(estimator).jacobian(h, labels)

    twin = estimator.double()
    for k, (row, label) in enumerate(zip(h.double(), labels, strict=True)):
        expected = torch.autograd.functional.jacobian(
            lambda h, label=label: twin.synthesize((h[None],), label[None], None)[0][0][0], row
        )
        assert_close(found[k], expected, rtol=1e-6, atol=1e-8)


def test_a_wide_derivative_is_taken_in_parts():
    spec = BoundarySpec("h", (LeafSpec((300,), torch.float32),))
    estimator = LinearEstimator(spec)
    nn.init.normal_(estimator.map.weight)
    found = GradientField(estimator).jacobian(torch.randn(40, 300))
    expected = estimator.map.weight.detach().double().expand(40, -1, -1)
    assert_close(found, expected, rtol=0, atol=1e-7)


def test_curl_and_curvature_of_known_fields():
    bowl = torch.diag(torch.tensor([1.0, 4.0])).expand(3, 2, 2)
    assert [float(v) for v in conservation(bowl)] == [0.0, 1.0]
    saddle = torch.diag(torch.tensor([1.0, -4.0]))[None]
    assert [float(v) for v in conservation(saddle)] == [0.0, -4.0]
    mixed = torch.tensor([[[1.0, 1.0], [-1.0, 1.0]]])  # symmetric part I, antisymmetric part of norm 2 of 4
    assert float(conservation(mixed).curl) == pytest.approx(2 * 2**0.5 / 2)
    assert float(conservation(mixed).smallest_eigenvalue) == pytest.approx(1.0)
    assert [float(v) for v in conservation(torch.zeros(2, 2, 2))] == [0.0, 0.0]


def test_a_linear_estimator_needs_no_differences():
    torch.manual_seed(0)
    estimator = LinearEstimator(SPEC, num_classes=2)
    nn.init.normal_(estimator.map.weight)
    h, labels = torch.randn(4, 3), torch.arange(4) % 2
    exact = conservation_of(estimator, h, labels)
    differences = conservation(GradientField(estimator).jacobian(h, labels))
    weight = estimator.map.weight.detach().double()
    assert float(exact.curl) == pytest.approx(float((weight - weight.t()).norm() / weight.norm()))
    assert float(exact.smallest_eigenvalue) == pytest.approx(
        float(torch.linalg.eigvalsh((weight + weight.t()) / 2)[0])
    )
    assert [float(v) for v in differences] == pytest.approx([float(v) for v in exact], rel=1e-6)


@pytest.mark.parametrize("kind", [CriticEstimator, LocalLossEstimator])
def test_the_gradient_of_a_loss_has_no_curl(kind):
    torch.manual_seed(0)
    estimator = kind(SPEC, num_classes=2, hidden_sizes=(8,))
    for parameter in estimator.parameters():
        nn.init.normal_(parameter)
    found = conservation_of(estimator, torch.randn(6, 3), torch.arange(6) % 2)
    assert float(found.curl) < 1e-5
    assert GradientField(estimator).jacobian(torch.randn(6, 3), torch.arange(6) % 2).abs().max() > 1e-3


class TwoLeaves(GradientEstimator):
    def synthesize(self, h, context, state):
        return (h[0], h[0]), None


def test_a_field_of_several_tensors_or_without_its_labels_is_refused():
    with pytest.raises(EstimatorError, match=r"Expected one tensor at the boundary, but TwoLeaves gives 2"):
        GradientField(TwoLeaves())(torch.ones(2, 3))
    with pytest.raises(EstimatorError, match=r"Expected `context` for LinearEstimator.*but got None"):
        GradientField(LinearEstimator(SPEC, num_classes=2))(torch.ones(2, 3))


def test_rows_that_are_compared_with_each_other_have_no_field():
    estimator = LocalLossEstimator(SPEC, num_classes=2, similarity=0.5)
    with pytest.raises(EstimatorError, match="LocalLossEstimator with `similarity` compares the rows"):
        GradientField(estimator)
