"""The gradient functions against numpy in float64, and their conventions."""

import doctest
import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_dni import metrics
from lightning_dni.metrics import (
    gradient_cosine,
    gradient_norm_ratio,
    gradient_relative_error,
    gradient_row_cosine,
    gradient_sign_agreement,
)


def mean_row_cosine(synthetic, true):
    return gradient_row_cosine(synthetic, true)[0]


def zero_row_share(synthetic, true):
    return gradient_row_cosine(synthetic, true)[1]


def numpy_cosine(s, t):
    s, t = s.ravel(), t.ravel()
    return s @ t / (np.linalg.norm(s) * np.linalg.norm(t))


def numpy_row_cosine(s, t):
    return np.mean([numpy_cosine(a, b) for a, b in zip(s, t, strict=True) if np.any(b)])


def numpy_zero_row_share(s, t):
    return np.mean([not np.any(b) for b in t])


def numpy_relative_error(s, t):
    return np.linalg.norm((s - t).ravel()) / np.linalg.norm(t.ravel())


def numpy_norm_ratio(s, t):
    return np.linalg.norm(s.ravel()) / np.linalg.norm(t.ravel())


def numpy_sign_agreement(s, t):
    where = t != 0
    return np.mean(np.sign(s[where]) == np.sign(t[where]))


WHOLE = {
    gradient_cosine: numpy_cosine,
    gradient_relative_error: numpy_relative_error,
    gradient_norm_ratio: numpy_norm_ratio,
    gradient_sign_agreement: numpy_sign_agreement,
}
BY_ROW = {mean_row_cosine: numpy_row_cosine, zero_row_share: numpy_zero_row_share}
REFERENCE = {**WHOLE, **BY_ROW}

each_function = pytest.mark.parametrize("function", REFERENCE)
# the share of zero rows is a count of the true gradient alone
each_distance = pytest.mark.parametrize("function", [f for f in REFERENCE if f != zero_row_share])


def pair(*shape, dtype=torch.float32):
    """Two correlated gradients; among rows, the true gradient has a zero row and a zero entry."""
    true = torch.randn(shape, dtype=torch.float64)
    synthetic = true + torch.randn(shape, dtype=torch.float64)
    if len(true.shape) > 1:
        true[0] = 0
        true[1, 0] = 0
    return synthetic.to(dtype), true.to(dtype)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(f, shape) for f in REFERENCE for shape in [(7,), (5, 3), (4, 2, 3, 3)]] + [(f, ()) for f in WHOLE],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_agrees_with_numpy(function, shape, dtype):
    synthetic, true = pair(*shape, dtype=dtype)
    value = function(synthetic, true)
    expected = REFERENCE[function](synthetic.double().numpy(), true.double().numpy())
    wide = dtype == torch.float64
    assert value.shape == ()
    assert value.dtype == (torch.float64 if wide else torch.float32)
    assert_close(value.item(), float(expected), rtol=1e-12 if wide else 1e-6, atol=1e-12)


@each_function
def test_one_wide_input_makes_a_wide_value(function):
    synthetic, true = pair(5, 3, dtype=torch.float16)
    value = function(synthetic.double(), true)
    assert value.dtype == torch.float64
    assert_close(value, function(synthetic.double(), true.double()), rtol=0, atol=0)


@each_function
def test_reads_strided_tensors(function):
    synthetic, true = pair(6, 4)
    expected = function(synthetic.t().contiguous(), true.t().contiguous())
    assert_close(function(synthetic.t(), true.t()), expected)


@pytest.mark.parametrize(
    ("function", "both_zero", "true_zero", "synthetic_zero"),
    [
        (gradient_cosine, 0, 0, 0),
        (mean_row_cosine, 0, 0, 0),
        (zero_row_share, 1, 1, 0),
        (gradient_relative_error, 0, math.inf, 1),
        (gradient_norm_ratio, 0, math.inf, 0),
        (gradient_sign_agreement, 0, 0, 0),
    ],
)
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=str)
def test_zero_gradients(function, both_zero, true_zero, synthetic_zero, shape):
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    values = [function(zeros, zeros), function(ones, zeros), function(zeros, ones)]
    assert [v.item() for v in values] == [both_zero, true_zero, synthetic_zero]


@each_function
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_gradient_is_a_zero_gradient(function, shape):
    empty, zeros = torch.zeros(shape), torch.zeros(2, 2)
    assert function(empty, empty) == function(zeros, zeros)


def test_rows_are_averaged_where_the_true_gradient_is_not_zero():
    true = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    synthetic = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    mean, zero_share = gradient_row_cosine(synthetic, true)
    assert_close(mean, torch.tensor((1.0 + 0.0 - 1.0) / 3))
    assert_close(zero_share, torch.tensor(0.25))


@each_distance
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poisoned", ["synthetic", "true", "both"])
@pytest.mark.parametrize("rest", ["ordinary", "zero"])
def test_what_is_not_finite_stays_visible(function, poison, poisoned, rest):
    # with "zero" a convention for zero gradients, or a row left out, could hide the poison
    synthetic, true = pair(3, 4) if rest == "ordinary" else (torch.zeros(3, 4), torch.zeros(3, 4))
    assert function(synthetic, true).isfinite()
    for tensor in [synthetic] * (poisoned != "true") + [true] * (poisoned != "synthetic"):
        tensor[0, 1] = poison
    assert function(synthetic, true).isnan()


def test_a_row_with_nan_is_not_a_zero_row():
    true = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    assert zero_row_share(torch.ones(2, 2), true) == 0.5


@each_distance
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 2.0**12),
        (torch.float32, 2.0**-120),
        (torch.float32, 2.0**120),
        (torch.float64, 2.0**-400),
        (torch.float64, 2.0**400),
    ],
    ids=str,
)
def test_neither_overflows_nor_vanishes(function, dtype, scale):
    synthetic, true = pair(5, 3, dtype=dtype)
    # a power of two scales exactly, so nothing but the range can make a difference
    assert_close(function(synthetic * scale, true * scale), function(synthetic, true), rtol=1e-7, atol=0)


def test_sums_of_many_half_precision_entries_do_not_stall():
    synthetic = torch.ones(100_000, dtype=torch.bfloat16)
    true = synthetic.clone()
    true[:50_000] = 0.5
    expected = math.sqrt(100_000 / (50_000 * 1.25))
    assert_close(gradient_norm_ratio(synthetic, true).item(), expected, rtol=1e-6, atol=0)


def test_a_small_error_does_not_cancel():
    true = torch.randn(50, dtype=torch.float64)
    synthetic = true + 1e-12 * torch.randn(50, dtype=torch.float64)
    expected = numpy_relative_error(synthetic.numpy(), true.numpy())
    assert_close(gradient_relative_error(synthetic, true).item(), float(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_cosine_stays_within_its_range(sign):
    for _ in range(200):
        true = torch.randn(3, dtype=torch.float64)
        assert gradient_cosine(sign * 0.3 * true, true).abs() <= 1


@each_function
def test_shapes_have_to_agree(function):
    # these two would broadcast
    with pytest.raises(ValueError, match=r"argument `true` .* `synthetic`, \(4, 3\), but got \(3,"):
        function(torch.ones(4, 3), torch.ones(3))


def test_rows_need_a_dimension():
    with pytest.raises(ValueError, match=r"rows along dimension 0, but got 0-d .*`gradient_cos"):
        gradient_row_cosine(torch.ones(()), torch.ones(()))


@each_function
def test_no_value_is_read_back_to_the_host(function):
    # a meta tensor has no values: `.item()`, `bool()` and branching on it raise
    gradient = torch.ones(4, 3, device="meta")
    assert function(gradient, gradient).device.type == "meta"


@pytest.mark.parametrize(
    "function", [gradient_cosine, mean_row_cosine, gradient_relative_error, gradient_norm_ratio]
)
def test_derivative(function):
    synthetic, true = pair(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, (synthetic.requires_grad_(), true))


@pytest.mark.parametrize(
    "function", [gradient_cosine, mean_row_cosine, gradient_relative_error, gradient_norm_ratio]
)
def test_derivative_is_zero_where_a_convention_decides(function):
    synthetic = torch.zeros(2, 3, requires_grad=True)
    true = torch.zeros(2, 3, requires_grad=True)
    grads = torch.autograd.grad(function(synthetic, true), (synthetic, true))
    assert_close(grads, (torch.zeros(2, 3), torch.zeros(2, 3)))


@pytest.mark.parametrize("name", metrics.__all__)
def test_every_public_name_has_an_example_that_runs(name):
    public = getattr(metrics, name)
    globs = {**vars(sys.modules[public.__module__])}
    (example,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=globs)
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0
