"""One row per estimator and variant: all laws run over all rows. A new estimator adds a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni.core import BoundarySpec, Feedback, GradientEstimator, LeafSpec, Lock, Record
from lightning_dni.estimators import (
    BackpropEstimator,
    ControlVariateEstimator,
    ConvEstimator,
    CriticCascade,
    CriticEstimator,
    DelayedGradientEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
    LinearEstimator,
    LocalLossEstimator,
    LowRankEstimator,
    MLPEstimator,
    ProbeEstimator,
    RecurrentEstimator,
    SobolevEstimator,
    ZeroEstimator,
)

CLASSES, CONTEXT_SIZE, POSITIONS = 3, 2, 4

SHAPES = {
    "vector": [(5,)],
    "sequence": [(POSITIONS, 5)],
    "signal": [(3, 7)],
    "map": [(3, 6, 5)],
    "leaves": [(5,), (2,)],
}
"""Shapes of a row, by kind of activation."""


@dataclass(frozen=True)
class Row:
    """An estimator and what is promised about it.

    Attributes:
        id: Name of the row.
        make: The user's factory.
        kind: Kind of activation, a key of SHAPES.
        context: "none", "labels", "token labels" (per position), "vectors" or "token vectors".
        learned: Whether it has anything to train.
        learns_from_network: Whether anything of the network above ever reaches it.
        rowwise: Whether a row's gradient depends on that row alone (no batch norm).
        positionwise: Whether a position's gradient depends on that position alone.
        locks: What the stage below waits for.
        starts_at_zero: Whether it gives exactly zero before it has learnt anything.
        chooses: Whether it treats rows differently that it chooses at random.
        squared: Whether the network's loss is a squared error, not a cross-entropy.
        late: Whether the stage is given it in a later step; `tests/core/test_delays.py` says what then.
    """

    id: str
    make: Callable[[BoundarySpec], GradientEstimator]
    kind: str = "vector"
    context: str = "none"
    learned: bool = True
    learns_from_network: bool = True
    rowwise: bool = True
    positionwise: bool = True
    locks: frozenset[Lock] = frozenset()
    starts_at_zero: bool = True
    chooses: bool = False
    squared: bool = False
    late: bool = False

    @property
    def spec(self):
        leaves = tuple(LeafSpec(shape, torch.float32) for shape in SHAPES[self.kind])
        return BoundarySpec(name="net.1", leaves=leaves)

    def build(self, seed=0, dtype=torch.float32):
        """The estimator as built, with the weights of `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(self.spec).to(dtype)

    def stirred(self, seed=0, dtype=torch.float32):
        """An estimator that no longer gives zero: every parameter has moved a little."""
        estimator, generator = self.build(seed, dtype), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in estimator.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        return estimator

    def sample(self, batch=6, seed=0, dtype=torch.float32):
        """An activation, its context, and what the network might answer."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=dtype)
        h = tuple(draw(batch, *shape) for shape in SHAPES[self.kind])
        rows = (batch, POSITIONS) if self.context.startswith("token") else (batch,)
        context = None
        if self.context.endswith("labels"):
            context = torch.randint(CLASSES, rows, generator=generator)
        elif self.context.endswith("vectors"):
            context = draw(*rows, CONTEXT_SIZE)
        target = tuple(draw(leaf.shape) for leaf in h)
        output, output_gradient = draw(*rows, CLASSES), draw(*rows, CLASSES)
        return h, context, Feedback(target=target, output=output, output_gradient=output_gradient)

    def is_regressor(self):
        return type(self.build()).regresses


def record_of(estimator, h, context, graph=None):
    """What the engine would keep of one synthesis; `graph` overrides what the estimator asks for."""
    with torch.set_grad_enabled(estimator.keeps_graph if graph is None else graph):
        gradient, state = estimator.synthesize(h, context, None)
    return Record(h, context, gradient, state)


def given(estimator, h, context, feedback):
    """What the stage is given in the end: what was said, or what replaces it once feedback is there."""
    record = record_of(estimator, h, context)
    with torch.no_grad():
        waits = estimator.locks or estimator.relays
        corrected = estimator.correct(record, feedback) if waits else None
    said = record.gradient if corrected is None else corrected
    return None if said is None else tuple(g.detach() for g in said)


def gradients_of(estimator, loss):
    """Gradients of `loss` by parameter name, zero for a parameter that it does not reach."""
    names, parameters = zip(*estimator.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)
    }


linear = LinearEstimator
mlp = partial(MLPEstimator, hidden_sizes=(7, 6))
plain_mlp = partial(mlp, batch_norm=False)
conv = partial(ConvEstimator, hidden_channels=(4,), kernel_size=3)
local_loss = partial(LocalLossEstimator, num_classes=CLASSES)
critic = partial(CriticEstimator, num_classes=CLASSES)
backprop, fa, dfa = BackpropEstimator, FeedbackAlignmentEstimator, DirectFeedbackAlignmentEstimator
kickback, delayed = KickbackEstimator, DelayedGradientEstimator
recurrent = partial(RecurrentEstimator, hidden_size=6)
sobolev = partial(SobolevEstimator, num_classes=CLASSES, derivative_weight=0.7)
cascade = partial(CriticCascade, num_classes=CLASSES)
low_rank, control_variate = partial(LowRankEstimator, rank=3), partial(ControlVariateEstimator, fraction=0.5)
labels, vectors = {"num_classes": CLASSES}, {"context_size": CONTEXT_SIZE}


UPDATE, BOTH = frozenset({Lock.UPDATE}), frozenset({Lock.UPDATE, Lock.BACKWARD})
FIXED = {"learned": False, "positionwise": False}
PADDED = {"num_classes": CLASSES, "ignore_index": 1}
SIMILAR = {"rowwise": False, "positionwise": False, "starts_at_zero": False, "learns_from_network": False}
CHOSEN = {"rowwise": False, "positionwise": False, "chooses": True, "locks": BOTH}


def head_rows(name, make, learns_from_network, hidden=True):
    """A head on every kind of activation, with hidden layers and without (or only so)."""
    variants = [
        ("", (), "vector", "labels", True),
        ("-hidden", (8,), "vector", "labels", True),
        ("-sequence", (), "sequence", "labels", False),
        ("-sequence-hidden", (8, 6), "sequence", "labels", False),
        ("-tokens", (), "sequence", "token labels", True),
        ("-tokens-hidden", (8,), "sequence", "token labels", True),
        ("-map", (), "map", "labels", True),
        ("-map-hidden", (8,), "map", "labels", True),
    ]
    return [
        Row(
            name + suffix,
            partial(make, hidden_sizes=sizes) if hidden else make,
            kind,
            context,
            learns_from_network=learns_from_network,
            positionwise=positionwise,
        )
        for suffix, sizes, kind, context, positionwise in variants
        if hidden or not sizes
    ]


ESTIMATORS = [
    *(
        Row(f"zero-{kind}", ZeroEstimator, kind, learned=False, learns_from_network=False)
        for kind in ("vector", "leaves")
    ),
    Row("linear", linear),
    Row("linear-labels", partial(linear, **labels), context="labels"),
    Row("linear-vectors", partial(linear, **vectors), context="vectors"),
    Row("linear-leaves", partial(linear, **labels), "leaves", "labels"),
    Row("linear-sequence", linear, "sequence"),
    Row("linear-sequence-labels", partial(linear, **labels), "sequence", "labels"),
    Row("linear-tokens", partial(linear, **labels), "sequence", "token labels"),
    Row("linear-token-vectors", partial(linear, **vectors), "sequence", "token vectors"),
    Row("mlp-plain", plain_mlp),
    Row("mlp-plain-labels", partial(plain_mlp, **labels), context="labels"),
    Row("mlp-plain-vectors", partial(plain_mlp, **vectors), context="vectors"),
    Row("mlp-plain-leaves", partial(plain_mlp, **labels), "leaves", "labels"),
    Row("mlp-plain-tokens", partial(plain_mlp, **labels), "sequence", "token labels"),
    Row("mlp-shallow-labels", partial(mlp, hidden_sizes=(), **labels), context="labels"),
    Row("mlp", mlp, rowwise=False),
    Row("mlp-labels", partial(mlp, **labels), context="labels", rowwise=False),
    Row("mlp-vectors", partial(mlp, **vectors), context="vectors", rowwise=False),
    Row("mlp-leaves", mlp, "leaves", rowwise=False),
    Row("mlp-sequence", partial(mlp, **labels), "sequence", "labels", rowwise=False, positionwise=False),
    Row("mlp-tokens", partial(mlp, **labels), "sequence", "token labels", rowwise=False, positionwise=False),
    Row("conv1d", conv, "signal", rowwise=False),
    Row("conv1d-labels", partial(conv, **labels), "signal", "labels", rowwise=False),
    Row("conv2d", conv, "map", rowwise=False),
    Row("conv2d-labels", partial(conv, **labels), "map", "labels", rowwise=False),
    Row("conv2d-shallow-labels", partial(conv, hidden_channels=(), **labels), "map", "labels"),
    *head_rows("local_loss", local_loss, learns_from_network=False),
    *head_rows("critic", critic, learns_from_network=True),
    *head_rows("probe", partial(ProbeEstimator, num_classes=CLASSES), False, hidden=False),
    Row("linear-prop", partial(linear, prop_alpha=0.3), locks=BOTH),
    Row("linear-prop-labels", partial(linear, prop_alpha=0.3, **labels), context="labels", locks=BOTH),
    Row("linear-prop-leaves", partial(linear, prop_alpha=0.3, **labels), "leaves", "labels", locks=BOTH),
    Row(
        "linear-prop-tokens",
        partial(linear, prop_alpha=2.0, **labels),
        "sequence",
        "token labels",
        locks=BOTH,
    ),
    Row("mlp-plain-prop-labels", partial(plain_mlp, prop_alpha=0.3, **labels), context="labels", locks=BOTH),
    Row("mlp-prop", partial(mlp, prop_alpha=0.3), rowwise=False, locks=BOTH),
    Row("conv2d-prop", partial(conv, prop_alpha=0.3, **labels), "map", "labels", rowwise=False, locks=BOTH),
    *head_rows("sobolev", sobolev, True, hidden=False),
    Row("sobolev-hidden", partial(sobolev, hidden_sizes=(8,)), context="labels"),
    Row("critic-share", partial(critic, label_share=0.4), context="labels"),
    Row("critic-share-map", partial(critic, label_share=0.4), "map", "labels"),
    Row("sobolev-share-map", partial(sobolev, label_share=0.4), "map", "labels"),
    Row("sobolev-share-tokens", partial(sobolev, label_share=0.4), "sequence", "token labels"),
    *head_rows("cascade", cascade, True, hidden=False),
    Row("cascade-hidden", partial(cascade, hidden_sizes=(8,)), context="labels"),
    *(
        Row(
            f"padded-{name}-tokens",
            partial(make, ignore_index=1),
            "sequence",
            "token labels",
            learns_from_network=hears,
        )
        for name, make, hears in (
            ("local_loss", local_loss, False),
            ("probe", partial(ProbeEstimator, num_classes=CLASSES), False),
            ("critic", partial(critic, label_share=0.4), True),
            ("sobolev", partial(sobolev, label_share=0.4), True),
            ("cascade", cascade, True),
        )
    ),
    Row(
        "padded-similarity",
        partial(local_loss, similarity=0.7, ignore_index=1),
        context="labels",
        **SIMILAR,
    ),
    *(
        Row(f"similarity-{kind}", partial(local_loss, similarity=0.7), kind, "labels", **SIMILAR)
        for kind in ("vector", "sequence", "map")
    ),
    Row("low_rank", low_rank),
    Row("low_rank-leaves", partial(low_rank, **labels), "leaves", "labels"),
    Row("low_rank-vectors", partial(low_rank, **vectors), context="vectors"),
    Row("low_rank-tokens", partial(low_rank, **labels), "sequence", "token labels"),
    Row("low_rank-padded-tokens", partial(low_rank, **PADDED), "sequence", "token labels"),
    Row("linear-padded-tokens", partial(linear, **PADDED), "sequence", "token labels"),
    Row("mlp-plain-padded-tokens", partial(plain_mlp, **PADDED), "sequence", "token labels"),
    Row("recurrent", recurrent),
    Row("recurrent-labels", partial(recurrent, **labels), context="labels"),
    Row("recurrent-leaves", recurrent, "leaves"),
    Row("recurrent-tokens", partial(recurrent, **labels), "sequence", "token labels"),
    Row("control_variate-labels", partial(control_variate, **labels), context="labels", **CHOSEN),
    Row("control_variate-leaves", control_variate, "leaves", **CHOSEN),
    Row(
        "control_variate-map",
        partial(control_variate, predictor=partial(conv, **labels)),
        "map",
        "labels",
        **CHOSEN,
    ),
    Row("control_variate-tokens", partial(control_variate, **labels), "sequence", "token labels", **CHOSEN),
    *(Row(f"backprop-{kind}", backprop, kind, **FIXED, locks=BOTH) for kind in SHAPES),
    Row("delayed-now", partial(delayed, delay=0), **FIXED, locks=BOTH),
    Row("delayed", delayed, **FIXED, late=True),
    Row("delayed-leaves", partial(delayed, delay=2), "leaves", **FIXED, late=True),
    *(Row(f"fa-{kind}", fa, kind, **FIXED, locks=BOTH) for kind in SHAPES),
    *(Row(f"dfa-{kind}", dfa, kind, **FIXED, locks=UPDATE) for kind in SHAPES),
    *(Row(f"kickback-{kind}", kickback, kind, **FIXED, locks=UPDATE, squared=True) for kind in SHAPES),
    *(
        Row(f"kickback-{kind}-{context}", partial(kickback, **labels), kind, context, **FIXED, locks=UPDATE)
        for kind, context in (("vector", "labels"), ("sequence", "token labels"), ("map", "labels"))
    ),
]


LEARNED = [row for row in ESTIMATORS if row.learned]
ROWWISE = [row for row in ESTIMATORS if row.rowwise]
REGRESSORS = [row for row in LEARNED if row.is_regressor()]
HEADS = [row for row in LEARNED if not row.is_regressor() and row.rowwise]
BATCH_NORM = [row for row in LEARNED if any(True for _ in row.build().buffers())]
CONDITIONED = [row for row in ESTIMATORS if row.context != "none"]
POSITIONWISE = [row for row in ESTIMATORS if row.kind == "sequence" and row.positionwise]


def each(rows):
    """Run a law over `rows`, as its argument `row`."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in rows])


def exact(a, b):
    assert_close(a, b, rtol=0, atol=0)


def synthesize(estimator, h, context):
    gradient, _ = estimator.synthesize(h, context, None)
    return None if gradient is None else tuple(g.detach() for g in gradient)


def lesson(estimator, h, context, feedback, graph=None):
    """Loss and its parameter gradients, as the engine would take them."""
    loss = estimator.loss(record_of(estimator, h, context, graph), feedback)
    return loss.detach(), gradients_of(estimator, loss)


class TwoLeaves(nn.Module):
    """A joint state, as of an LSTM: what crosses is a pair of tensors."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 5), nn.Linear(width, 2)

    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, tuple) else x
        return torch.tanh(self.first(x)), torch.tanh(self.second(x))


class Classify(nn.Module):
    """Scores of what crosses: per position or per row, whatever its form."""

    def __init__(self, width, pool):
        super().__init__()
        self.pool, self.scores = pool, nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.scores(self.pool(torch.cat(x, 1) if isinstance(x, tuple) else x))


def network(row, dtype=torch.float32, seed=0):
    """A network with boundaries "0" and "1" of the row's kind, and its input's shape without rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if row.kind == "leaves":
            stages, inputs = [TwoLeaves(6), TwoLeaves(7)], (6,)
        elif row.kind in ("signal", "map"):
            convolution = nn.Conv1d if row.kind == "signal" else nn.Conv2d
            stages = [nn.Sequential(convolution(c, 3, 3, padding=1), nn.Tanh()) for c in (2, 3)]
            inputs = (2, *SHAPES[row.kind][0][1:])
        else:
            stages = [nn.Sequential(nn.Linear(w, 5), nn.Tanh()) for w in (6, 5)]
            inputs = (*SHAPES[row.kind][0][:-1], 6)
        return nn.Sequential(*stages, Classify(*_pooling(row))).to(dtype), inputs


def _pooling(row):
    if row.kind in ("signal", "map"):
        return 3, lambda x: x.flatten(2).mean(2)
    if row.kind == "sequence" and not row.context.startswith("token"):
        return 5, lambda x: x.mean(1)
    return sum(shape[-1] for shape in SHAPES[row.kind]), lambda x: x


def batch_for(row, inputs, batch=6, seed=0, dtype=torch.float32):
    """A batch (x, context, classes or what else the loss takes) for `network`; estimators see the context."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *inputs, generator=generator, dtype=dtype)
    _, context, feedback = row.sample(batch, seed, dtype)
    if row.squared:
        return x, context, feedback.output
    classes = context if row.context.endswith("labels") else feedback.output.argmax(-1)
    return x, context, classes


def loss_of(scores, classes):
    """Cross-entropy (or squared error) summed over rows and positions, over the number of rows."""
    if classes.is_floating_point():
        return 0.5 * (scores - classes).square().sum() / len(classes)
    return F.cross_entropy(scores.flatten(0, -2), classes.flatten(), reduction="sum") / len(classes)
