"""Whether sequences go on at a truncation: what is told where none does, and taught where nobody knows."""

import warnings

import pytest
import torch
from core.recurrent import (
    BATCH,
    Net,
    closely,
    draw_chunks,
    engine_of,
    exactly,
    stirred,
    train,
    weights,
)
from torch.utils import _pytree as pytree

from lightning_dni.core.continuity import PATIENCE
from lightning_dni.core.estimator import GradientEstimator


def carried(change, number):
    """Train on chunks of which each begins with `change(state)`, step by step as `train` does."""
    net, state = Net(), None
    engine = engine_of(net, stirred)
    with engine:
        for chunk in draw_chunks(number, resets=False):
            _, state = train(net, engine, [chunk], state=state)
            state = change(state)


@pytest.mark.parametrize(
    "change",
    [lambda state: None, lambda state: tuple(0.5 * s for s in state), lambda state: (state[0], 0 * state[1])],
    ids=["none", "scaled", "without c"],
)
def test_where_no_sequence_ever_goes_on_that_is_told_once(change):
    with pytest.warns(UserWarning, match="No sequence has gone on at truncation 'core'") as told:
        carried(change, 2 * PATIENCE)
    assert len(told) == 1


ONE, NONE = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(BATCH)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ([None], PATIENCE - 1),
        ([ONE, ONE, None], 2 * PATIENCE),
        ([NONE], 2 * PATIENCE + 5),
        ([NONE] * (2 * PATIENCE) + [ONE], 4 * PATIENCE),
    ],
    ids=["few steps", "one went on", "all end", "one goes on later"],
)
def test_nothing_is_told_after_few_steps_or_where_one_sequence_went_on_or_all_have_ended(changes, number):
    """A curriculum may begin with sequences of one chunk."""
    seen = []

    def change(state):
        keep = changes[min(len(seen), len(changes) - 1)]
        seen.append(state)
        return None if keep is None else tuple(s * keep.view(1, -1, 1) for s in state)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        carried(change, number)


@pytest.mark.parametrize("saved", [False, True])
def test_a_sequence_that_goes_on_into_a_step_without_a_loss_teaches_nothing(saved):
    """Of the end before it: what would have come back is not known."""
    first, middle, last = draw_chunks(3, resets=False)
    net = Net()
    engine = engine_of(net, stirred)
    with engine:
        _, state = train(net, engine, [first], rate=0.0)
        with engine.training_step():
            _, state = net(middle[0], state)
        state = pytree.tree_map(torch.Tensor.detach, state)
        with engine.training_step():
            pass
    if saved:
        held, engine = engine.state_dict(), engine_of(net, stirred)
        engine.load_state_dict(held)
    before = weights(engine)
    with engine:
        train(net, engine, [last], rate=0.0, state=state)
    exactly(weights(engine), before)


def test_a_loss_may_be_divided_by_what_the_state_tells():
    chunks, found = draw_chunks(3), []
    for denominator in ("batch", lambda batch, h: float(h[0].shape[1])):  # of an LSTM's (h, c)
        net = Net()
        engine = engine_of(net, stirred, loss_denominator=denominator)
        with engine:
            found.append((train(net, engine, chunks)[0], weights(engine)))
    exactly(found[1], found[0])


class Counts(GradientEstimator):
    """Remembers how many chunks of each sequence it has seen, and says so."""

    def synthesize(self, h, context, state):
        seen = h[0].new_zeros(len(h[0]), dtype=torch.int64) if state is None else state
        return tuple(torch.full_like(leaf, 1.0) * seen.view(-1, 1) for leaf in h), seen + 1


def test_whole_numbers_in_the_state_of_an_estimator_stay_whole():
    chunks, said = draw_chunks(4), []
    net, state = Net(), None
    engine = engine_of(net, lambda spec: Counts())
    with engine:
        for chunk in chunks:
            _, state = train(net, engine, [chunk], rate=0.0, state=state)
            (ending,) = engine.state_dict()["truncations"]["core"]
            assert ending["state"].dtype == torch.int64
            said.append(ending["gradient"][0][:, 0])
    anew = [a for _, _, a in chunks]
    expected = [torch.zeros(BATCH)]
    for each in anew[1:]:
        expected.append((expected[-1] + 1) * ~each)
    closely(torch.stack(said), torch.stack(expected).double())
