"""The gradient metrics, over batches and over two processes, against the functions."""

import math
import warnings
from functools import partial

import pytest
import torch
from processes import on_ranks
from torch.testing import assert_close

from lightning_dni.metrics import (
    GradientCosineSimilarity,
    GradientNormRatio,
    GradientRelativeError,
    GradientSignAgreement,
    gradient_cosine,
    gradient_norm_ratio,
    gradient_relative_error,
    gradient_row_cosine,
    gradient_sign_agreement,
)

TABLE = {
    "cosine": (GradientCosineSimilarity, gradient_cosine),
    "row cosine": (
        partial(GradientCosineSimilarity, reduction="rows"),
        lambda synthetic, true: gradient_row_cosine(synthetic, true)[0],
    ),
    "error": (GradientRelativeError, gradient_relative_error),
    "ratio": (GradientNormRatio, gradient_norm_ratio),
    "sign": (GradientSignAgreement, gradient_sign_agreement),
}

each_metric = pytest.mark.parametrize(("make", "function"), TABLE.values(), ids=TABLE)


def zero_count(metric):
    return metric.zero_rows if hasattr(metric, "zero_rows") else metric.zero_gradients


def make_batches(dtype=torch.float32):
    """Five unequal batches; the third has a zero true gradient, the last one a zero row."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for k, rows in enumerate([4, 1, 3, 6, 2]):
        true = torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64) * 2.0**k
        synthetic = true + torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64)
        batches.append((synthetic.to(dtype), true.to(dtype)))
    batches[1][0].copy_(-batches[1][1])  # all wrong is not the same as nothing to compare
    batches[2][1].zero_()
    batches[4][1][0].zero_()
    return batches


def joined(batches):
    return tuple(torch.cat(side) for side in zip(*batches, strict=True))


def updated(metric, batches):
    for synthetic, true in batches:
        metric.update(synthetic, true)
    return metric


@each_metric
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-7), (torch.float16, 1e-7), (torch.bfloat16, 1e-7)],
    ids=str,
)
def test_batches_equal_their_concatenation(make, function, dtype, rtol):
    batches = make_batches(dtype)
    value = updated(make(), batches).compute()
    assert_close(value, function(*joined(batches)), rtol=rtol, atol=0)


@each_metric
def test_forward_gives_the_batch_and_keeps_the_total(make, function):
    batches, metric = make_batches(), make()
    for batch in batches:
        assert_close(metric(*batch), function(*batch))
    assert_close(metric.compute(), function(*joined(batches)), rtol=1e-7, atol=0)


@each_metric
def test_reset_forgets(make, function):
    batches = make_batches()
    metric = updated(make(), batches[:3])
    metric.reset()
    assert zero_count(metric) == 0
    assert_close(updated(metric, batches[3:]).compute(), function(*joined(batches[3:])))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cosine", 1), ("row cosine", 3 + 1), ("error", 1), ("ratio", 1), ("sign", 1)],
)
def test_zero_references_are_counted(name, expected):
    make, _ = TABLE[name]
    assert zero_count(updated(make(), make_batches())) == expected


def test_zero_rows_over_rows_is_the_share_of_the_function():
    batches = make_batches()
    metric = updated(GradientCosineSimilarity(reduction="rows"), batches)
    _, zero_share = gradient_row_cosine(*joined(batches))
    assert_close(metric.zero_rows / metric.rows, zero_share)
    assert updated(GradientCosineSimilarity(), batches).rows == len(batches)


@each_metric
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["synthetic", "true"])
def test_what_is_not_finite_stays_visible_to_the_end(make, function, poison, side):
    batches = make_batches()
    assert updated(make(), batches).compute().isfinite()
    batches[2][side][0, 0, 0] = poison
    assert updated(make(), batches).compute().isnan()


@each_metric
def test_a_vanishing_gradient_is_not_a_zero_gradient(make, function):
    batches = make_batches()
    metric = updated(make(), [(s * 2.0**-110, t * 2.0**-110) for s, t in batches])
    assert_close(metric.compute(), function(*joined(batches)), rtol=1e-7, atol=0)
    assert zero_count(metric) == zero_count(updated(make(), batches))


@each_metric
def test_a_long_run_does_not_drift(make, function):
    # with float32 sums the small batches behind the large one would not count at all
    small, large = make_batches()[0], make_batches()[3]
    large = tuple(2.0**12 * side for side in large)
    metric = updated(make(), [large])
    before = {name: getattr(metric, name).clone() for name in metric._defaults}
    metric.update(*small)
    alone = updated(make(), [small])
    for name, start in before.items():
        assert_close(getattr(metric, name) - start, getattr(alone, name), rtol=1e-6, atol=0)


@each_metric
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
    ],
    ids=["half", "to bfloat16", "to device and float16"],
)
def test_sums_survive_a_cast_of_the_model(make, function, cast):
    batches = make_batches()
    model = torch.nn.Module()
    model.metric = updated(make(), batches[:3])
    cast(model)
    value = updated(model.metric, batches[3:]).compute()
    assert_close(value, function(*joined(batches)), rtol=1e-7, atol=0)


@each_metric
def test_sums_can_be_made_float32_where_there_is_no_float64(make, function):
    batches = make_batches()
    metric = updated(make().set_dtype(torch.float32), batches)
    assert {getattr(metric, name).dtype for name in metric._defaults} == {torch.float32}
    assert_close(metric.compute(), function(*joined(batches)), rtol=1e-5, atol=0)


@each_metric
def test_a_reset_under_inference_mode_is_no_dead_end(make, function):
    batches, metric = make_batches(), make()
    with torch.inference_mode():
        metric.reset()
        metric.update(*batches[0])
    updated(metric, batches[1:])
    assert_close(metric.compute(), function(*joined(batches)))


@each_metric
def test_no_value_is_read_back_to_the_host(make, function):
    # a meta tensor has no values: `.item()`, `bool()` and branching on it raise
    metric, gradient = make().to("meta"), torch.ones(4, 3, device="meta")
    metric.update(gradient, gradient)
    assert metric.compute().device.type == "meta"


@each_metric
def test_is_differentiable_is_true_of_forward(make, function):
    synthetic, true = make_batches()[0]
    metric = make()
    assert metric(synthetic.requires_grad_(), true).requires_grad == metric.is_differentiable


@each_metric
def test_higher_is_better_is_true(make, function):
    _, true = make_batches()[0]
    perfect = updated(make(), [(true, true)]).compute()
    opposite = updated(make(), [(-true, true)]).compute()
    if make().higher_is_better is None:
        assert perfect == opposite
    else:
        assert make().higher_is_better == (perfect > opposite)


@each_metric
def test_shapes_have_to_agree(make, function):
    metric = updated(make(), make_batches())
    before = metric.compute()
    with pytest.raises(ValueError, match=r"argument `true` .* `synthetic`, \(4, 3\), but got \(3,"):
        metric.update(torch.ones(4, 3), torch.ones(3))
    metric._computed = None
    assert_close(metric.compute(), before, rtol=0, atol=0)


def test_reduction_has_to_be_known():
    with pytest.raises(ValueError, match=r"`reduction` to be one of \('flatten', 'rows'\), but got 'mean'"):
        GradientCosineSimilarity(reduction="mean")


SHARES = {0: (0, 2, 4), 1: (1, 3)}  # the zero batch and the zero row are rank 0's


def measure(rank, dtype):
    """On one of two processes: each metric over this rank's batches, and over those of rank 0."""
    warnings.filterwarnings("ignore", message="The ``compute`` method")
    batches = make_batches(dtype)
    found = {}
    for name, (make, _) in TABLE.items():
        metric = updated(make(), [batches[k] for k in SHARES[rank]])
        with metric.sync_context():
            zeros = zero_count(metric).clone()
        idle = updated(make(), batches if rank == 0 else [])
        found[name] = (metric.compute(), zeros, zero_count(metric), idle.compute())
    return found


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def measured(request):
    """The results of two real processes, by rank, and their dtype."""
    return on_ranks(measure, request.param), request.param


@pytest.mark.parametrize("name", TABLE)
def test_two_processes_equal_one(measured, name):
    ranks, dtype = measured
    make, function = TABLE[name]
    batches = make_batches(dtype)
    joint = function(*joined(batches))
    rtol = 1e-12 if dtype == torch.float64 else 1e-7
    total = zero_count(updated(make(), batches))
    for rank, found in enumerate(ranks):
        value, zeros, own_zeros, _ = found[name]
        assert_close(value, joint, rtol=rtol, atol=0)
        assert_close(zeros, total)
        assert own_zeros == (total if rank == 0 else 0)


@pytest.mark.parametrize("name", TABLE)
def test_a_process_without_a_batch_agrees_with_the_other(measured, name):
    ranks, dtype = measured
    joint = TABLE[name][1](*joined(make_batches(dtype)))
    for found in ranks:
        idle = found[name][3]
        # what was never given a gradient cannot know its dtype
        assert_close(idle, joint, rtol=1e-7, atol=0, check_dtype=False)
