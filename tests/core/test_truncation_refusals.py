"""What cannot be truncated is refused by name, with what to do instead."""

from functools import partial

import pytest
import torch
from core.recurrent import (
    BATCH,
    FEATURES,
    WIDTH,
    Net,
    draw_chunks,
    engine_of,
    train,
)
from core.truncated_stage import Reader
from torch import nn

from lightning_dni import MLPInputEstimator
from lightning_dni.core import DNIEngine, GradientEstimator, Lock, Signal
from lightning_dni.errors import BoundaryError, EstimatorError
from lightning_dni.estimators import (
    BackpropEstimator,
    CriticEstimator,
    DelayedGradientEstimator,
    LinearEstimator,
    LocalLossEstimator,
)

# ---- refusals


class Waits(GradientEstimator):
    """Has to be told first."""

    needs, locks = frozenset({Signal.TARGET}), frozenset({Lock.UPDATE})

    def synthesize(self, h, context, state):
        return None, None


@pytest.mark.parametrize(
    ("estimator", "why"),
    [
        (partial(CriticEstimator, num_classes=2), "needs ['network output']"),
        (partial(LocalLossEstimator, num_classes=2), "never hears of it"),
        (BackpropEstimator, "waits for it"),
        (DelayedGradientEstimator, "waits for it"),
        (lambda spec: Waits(), "waits for it"),
    ],
)
def test_an_estimator_that_cannot_learn_at_the_end_of_a_chunk_is_refused(estimator, why):
    net = Net("gru")
    engine = engine_of(net, estimator, "gru")
    with engine, pytest.raises(EstimatorError) as caught:
        train(net, engine, draw_chunks(1))
    assert "Expected an estimator that learns from the target gradient alone" in str(caught.value)
    assert why in str(caught.value)


class Forgets(Waits):
    """Learns from what it has said alone, which carries no graph here."""

    locks = frozenset()

    def __init__(self, spec):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def synthesize(self, h, context, state):
        return tuple(self.weight * leaf for leaf in h), None

    def loss(self, record, feedback):
        return record.gradient[0].square().mean()


def test_an_estimator_whose_loss_has_no_graph_is_refused():
    net = Net()
    engine = engine_of(net, Forgets)
    with engine, pytest.raises(EstimatorError, match="Expected the loss of Forgets at boundary 'core' to"):
        train(net, engine, draw_chunks(2))


class Odd(nn.Module):
    """Returns, and is given, what a truncation cannot use."""

    def __init__(self, returns, width=WIDTH):
        super().__init__()
        self.core = nn.Module()
        self.linear, self.returns = nn.Linear(FEATURES, width), returns
        self.core.forward = lambda x, state=None: self.returns(self.linear(x), state)

    def forward(self, x, state=None):
        return self.core(x, state)[0]


@pytest.mark.parametrize(
    ("returns", "match"),
    [
        (lambda h, state: [h, h], r"to return \(output, state\), but got list"),
        (lambda h, state: (h, h, h), r"to return \(output, state\), but got 3 values"),
        (lambda h, state: (h, h[None]), "whose batch dimension is known"),
        (lambda h, state: (h, h.sum(1)), "whose batch dimension is known"),
        (lambda h, state: (h, (h, h[:2])), "to have the same number of rows in dimension 0"),
    ],
)
def test_a_module_that_does_not_hand_on_a_state_is_refused(returns, match):
    model = Odd(returns)
    engine = DNIEngine(model, [], LinearEstimator, truncations=["core"])
    with engine, engine.training_step(), pytest.raises(BoundaryError, match=match):
        model(torch.zeros(BATCH, FEATURES))


@pytest.mark.parametrize(
    ("second", "kind"), [(torch.tensor([3, 2, 3, 1]), "torch.int64"), ([3, 2, 3, 1], "int")]
)
def test_numbers_in_the_place_of_the_state_are_refused(second, kind):
    """Of a module that is called with the sequences' lengths before the state."""
    model = Odd(lambda h, state: (h, h))
    engine = DNIEngine(model, [], LinearEstimator, truncations=["core"])
    match = rf"called as module\(input, state\), but got \['{kind}'\]"
    with engine, engine.training_step(), pytest.raises(BoundaryError, match=match):
        model(torch.zeros(BATCH, FEATURES), second)


@pytest.mark.parametrize("state", [None, (), (None, {"step": 0})], ids=str)
def test_a_state_that_has_yet_to_be_made_is_none(state):
    model = Odd(lambda h, state: (h, h))
    engine = DNIEngine(model, [], LinearEstimator, truncations=["core"], labels=None)
    with engine:
        with engine.training_step():
            loss = model(torch.zeros(BATCH, FEATURES), state).sum()
        engine.backward(loss)


def test_a_complex_state_is_refused():
    """Also beside a real one, where it would be left out."""
    for returns in (lambda h, s: (h, torch.complex(h, h)), lambda h, s: (h, (h, torch.complex(h, h)))):
        model = Odd(returns)
        engine = DNIEngine(model, [], LinearEstimator, truncations=["core"])
        with engine, engine.training_step(), pytest.raises(BoundaryError, match="Expected real activations"):
            model(torch.zeros(BATCH, FEATURES))


def test_a_truncation_that_did_not_run_is_refused():
    net = Net()
    engine = engine_of(net, LinearEstimator)
    with engine:
        with engine.training_step():
            loss = net.head(torch.zeros(1, 2).double()).sum()
        with pytest.raises(BoundaryError, match="Expected every truncation to run"):
            engine.backward(loss)


def test_a_second_loss_through_a_chunk_is_refused():
    net, (chunk, _) = Net(), draw_chunks(2)
    engine = engine_of(net, LinearEstimator)
    with engine, engine.training_step(several_losses=True):
        out, _ = net(chunk[0])
        engine.backward(out.sum())
        with pytest.raises(BoundaryError, match="Expected one backward pass through each chunk"):
            engine.backward(out.mean())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"bp_lambda": 0.5}, EstimatorError, "Expected no `bp_lambda` with `truncations`"),
        (
            {"synthetic_inputs": MLPInputEstimator},
            EstimatorError,
            "Expected no `synthetic_inputs` with `truncations`",
        ),
        ({"update_probability": 0.5}, EstimatorError, "Expected no `update_probability` with"),
        ({"update": "immediate"}, EstimatorError, "Expected no `update` with `truncations`"),
        ({"damping": 0.0}, EstimatorError, "Expected `damping` to be above 0 and up to 1, but got 0.0"),
        ({"truncations": ["cor"]}, BoundaryError, "Expected `truncations` to name .* Did you mean 'core'"),
    ],
)
def test_an_option_that_does_not_go_with_truncations_is_refused(options, error, match):
    given = {"boundaries": [], "truncations": ["core"], **options}
    with pytest.raises(error, match=match):
        DNIEngine(Net(), estimator=LinearEstimator, **given)


def test_a_lambda_that_is_set_later_is_refused_beside_truncations():
    """As by a schedule; at a boundary below, whose stage would wait for the future."""
    engine = DNIEngine(Reader(), ["eyes"], LinearEstimator, truncations=["core"])
    engine.set_bp_lambda({"eyes": 0.0})
    with pytest.raises(EstimatorError, match=r"Expected no `bp_lambda` with `truncations`, but got \{'eyes'"):
        engine.set_bp_lambda({"eyes": 0.5})
    assert engine.bp_lambda == {"eyes": 0.0}


def test_a_bidirectional_module_is_refused():
    model = nn.Sequential(nn.LSTM(2, 2, bidirectional=True))
    with pytest.raises(BoundaryError, match="Expected a recurrent module that reads forward"):
        DNIEngine(model, [], LinearEstimator, truncations=["0"])
