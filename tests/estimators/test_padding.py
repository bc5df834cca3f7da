"""Labels of padding: zero gradient there, nothing learnt from it, whatever stands there."""

from functools import partial

import pytest
import torch
from padded import BY_ROW, HEADS, MAKES, PADDING, REGRESSORS
from tables import CLASSES, SHAPES, record_of
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, DNIEngine, Feedback, LeafSpec
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    ControlVariateEstimator,
    MLPEstimator,
)

PER_ROW = [
    *((name, kind) for name in BY_ROW for kind in ("vector", "sequence")),
    *((name, "map") for name in BY_ROW if name not in REGRESSORS),
]
"""With one label for each row: what is made, and of which kind of activation."""
each_kind = pytest.mark.parametrize(
    "make", [pytest.param(partial(make, num_classes=CLASSES), id=name) for name, make in MAKES.items()]
)


def spec_of(kind):
    return BoundarySpec("net.1", (LeafSpec(SHAPES[kind][0], torch.float32),))


def stirred(make, kind="sequence", **options):
    torch.manual_seed(1)
    estimator = make(spec_of(kind), **options).double()
    for p in estimator.parameters():
        p.data += 0.3 * torch.randn(p.shape).double()
    return estimator


def sample(h_shape, label_shape):
    """An activation, labels, and all that a network might answer."""
    h, labels = torch.randn(h_shape).double(), torch.randint(CLASSES, label_shape)
    answers = {
        "target": torch.randn(h_shape).double(),
        "output": torch.randn(*label_shape, CLASSES).double(),
        "above": torch.rand(label_shape).double(),
    }
    return h, labels, answers


def gradients(estimator, h, labels, answers, topmost=True):
    """By autograd, and by hand where the estimator has them."""
    estimator.zero_grad()
    record, target = record_of(estimator, (h,), labels), answers["target"]
    above = None if topmost else answers["above"].flatten()
    told = Feedback(target=(target,), output=answers["output"], above=above)
    loss = estimator.loss(record, told)
    assert loss.isfinite()
    loss.backward()
    found = {n: p.grad.clone() for n, p in estimator.named_parameters()}
    if estimator.differentiates:
        made = dict(
            estimator.parameter_gradients(record, (record.gradient[0].detach() - target,), 2.0 / len(h))
        )
        for n, p in estimator.named_parameters():
            assert_close(made[p], found[n], rtol=0, atol=1e-10)
    return record.gradient[0].detach(), found


@pytest.mark.parametrize("topmost", [True, False])
@each_kind
def test_padded_sequences_are_the_short_ones(make, topmost):
    """Gradients for positions and for parameters are those of sequences without what was appended."""
    h, labels, answers = sample((6, 4, 5), (6, 4))
    short = {k: v[:, :3] for k, v in answers.items()}
    said, learnt = gradients(stirred(make), h[:, :3], labels[:, :3], short, topmost)
    labels[:, 3] = PADDING
    padded, again = gradients(stirred(make, ignore_index=PADDING), h, labels, answers, topmost)
    assert_close(padded[:, :3], said, rtol=0, atol=1e-10)
    assert said.any()
    assert not padded[:, 3].any()
    assert_close(again, learnt, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), PER_ROW)
def test_a_padded_row_is_no_row(name, kind):
    """With one label for a whole sample; but that a loss is averaged over all rows."""
    make, shape = partial(BY_ROW[name], num_classes=CLASSES), SHAPES[kind][0]
    h, labels, answers = sample((6, *shape), (6,))
    kept = torch.tensor([True, True, False, True, True, False])
    fewer = {k: v[kept] for k, v in answers.items()}
    said, learnt = gradients(stirred(make, kind), h[kept], labels[kept], fewer)
    labels[~kept] = PADDING
    padded, again = gradients(stirred(make, kind, ignore_index=PADDING), h, labels, answers)
    assert_close(padded[kept], said, rtol=0, atol=1e-10)
    assert said.any()
    assert not padded[~kept].any()
    assert_close({n: g * 6 / 4 for n, g in again.items()}, learnt, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*HEADS, "similarity"])
def test_a_batch_of_padding_alone_teaches_nothing(name):
    h, labels, answers = sample((6, 4, 5), (6,))
    padded = labels.fill_(PADDING)
    said, learnt = gradients(
        stirred(partial(BY_ROW[name], num_classes=CLASSES), ignore_index=PADDING), h, padded, answers
    )
    assert not said.any()
    assert not any(g.any() for g in learnt.values())


@each_kind
def test_bytes_are_labels_of_padding_too(make):
    h, labels, answers = sample((6, 4, 5), (6, 4))
    labels[:, 3] = 255
    estimator = stirred(make, ignore_index=255)
    found = gradients(estimator, h, labels.to(torch.uint8), answers)
    assert_close(found, gradients(estimator, h, labels, answers), rtol=0, atol=0)
    assert not found[0][:, 3].any()


@each_kind
def test_no_byte_is_minus_100(make):
    """In the arithmetic of bytes 156 is; it is a class."""
    make = partial(make.func, **{**make.keywords, "num_classes": 200})
    h, labels, answers = sample((6, 4, 5), (6, 4))
    answers["output"] = torch.randn(6, 4, 200).double()
    labels[:, 3] = 156
    found = gradients(stirred(make, ignore_index=PADDING), h, labels.to(torch.uint8), answers)
    assert_close(found, gradients(stirred(make), h, labels, answers), rtol=0, atol=0)


def steps(make, x, labels, rows=None, **options):
    """Three steps through an engine on a loss summed over positions; all that has been learnt.

    A mean over rows, or where `rows` count a sum: then estimators, whose losses are means, step that many
    times as far.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    user = torch.optim.SGD(model.double().parameters(), lr=0.05)
    engine = DNIEngine(
        model,
        ["1", "3"],
        lambda spec: stirred(make, "sequence" if x.ndim == 3 else "vector", **options),
        labels=1,
        estimator_optimizer=partial(torch.optim.SGD, lr=0.1 if rows is None else 0.01 * rows),
        loss_denominator="batch" if rows is None else "sum",
    )
    with engine:
        for _ in range(3):
            user.zero_grad()
            with engine.training_step((x, labels)):
                scores = model(x).flatten(0, -2)
                loss = F.cross_entropy(scores, labels.flatten(), reduction="sum")
                loss = loss / len(x) if rows is None else loss
            engine.backward(loss)
            user.step()
            engine.update_estimators()
    learnt = {f"{n}.{k}": v for n, e in engine.estimators.items() for k, v in e.state_dict().items()}
    return {**model.state_dict(), **learnt}


@each_kind
def test_in_an_engine_padded_sequences_are_the_short_ones(make):
    x, labels = torch.randn(8, 4, 6).double(), torch.randint(CLASSES, (8, 4))
    short = steps(make, x[:, :2], labels[:, :2])
    labels[:, 2:] = PADDING
    assert_close(steps(make, x, labels, ignore_index=PADDING), short, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BY_ROW)
def test_in_an_engine_a_padded_row_is_no_row(name):
    make = partial(BY_ROW[name], num_classes=CLASSES)
    x, labels = torch.randn(8, 6).double(), torch.randint(CLASSES, (8,))
    fewer = steps(make, x[:5], labels[:5], rows=5)
    labels[5:] = PADDING
    assert_close(steps(make, x, labels, rows=8, ignore_index=PADDING), fewer, rtol=0, atol=1e-10)


def refused(make, labels, match):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    x = torch.randn(len(labels), 6)
    with (
        DNIEngine(model, ["1"], make, labels=1) as engine,
        pytest.raises(EstimatorError, match=match),
        engine.training_step((x, labels)),
    ):
        model(x)


@pytest.mark.parametrize("name", [*MAKES, "control_variate"])
def test_an_engine_refuses_labels_of_padding_without_it(name):
    """Also -100, which torch's cross-entropy ignores unasked, and bytes that would be -100."""
    make = partial(MAKES.get(name, ControlVariateEstimator), num_classes=CLASSES)
    refused(make, torch.tensor([0, 2, PADDING]), r"from -100 to 2.* take `ignore_index`")
    if name == "control_variate":
        return
    make = partial(make, ignore_index=PADDING)
    refused(make, torch.tensor([0, CLASSES, PADDING]), r"in \[0, 3\) .* but got values from 0 to 3")
    refused(make, torch.tensor([0, 156], dtype=torch.uint8), r"but got values from 0 to 156")


@pytest.mark.parametrize("kind", REGRESSORS)
def test_padding_needs_labels(kind):
    with pytest.raises(EstimatorError, match=r"`num_classes` with `ignore_index` for boundary 'net.1'"):
        REGRESSORS[kind](spec_of("sequence"), ignore_index=PADDING)


def test_batch_norm_would_count_padding():
    with pytest.raises(
        EstimatorError, match="`batch_norm` to be False with `ignore_index` for MLPEstimator at bo"
    ):
        MLPEstimator(spec_of("sequence"), num_classes=CLASSES, ignore_index=PADDING)
