"""Requests travel with the messages, and every stage grants them at the same batch."""

from collections import deque

import pytest

from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.riding import carry
from lightning_dni.pipeline.signals import Ask, Notices, Signals
from lightning_dni.pipeline.watch import Watch


class Queue:
    """A way in one process."""

    def __init__(self):
        self.under_way = deque()

    def send(self, message):
        self.under_way.append(message)

    def receive(self):
        return self.under_way.popleft()


class Board:
    """What all have asked for, at once."""

    def __init__(self):
        self.bits = 0

    def ask(self, asked):
        self.bits |= asked

    def asked(self):
        return self.bits


def chain(stages, staleness=0, board=None):
    """The signals of each stage and its links, which carry them."""
    up, down = [Queue() for _ in range(stages - 1)], [Queue() for _ in range(stages - 1)]
    found = []
    for k in range(stages):
        signals = Signals(k, stages, staleness, board)
        given = {}
        if k:
            given |= {"activation_in": up[k - 1], "gradient_out": down[k - 1]}
        if k < stages - 1:
            given |= {"activation_out": up[k], "gradient_in": down[k]}
        found.append((signals, carry(signals, Links(**given))))
    return found


def batch(stages, step, gradients=True):
    """One batch through all stages, at no lag; what is decided for it on each."""
    for signals, links in stages:
        signals.begin()
        if links.activation_in:
            assert links.activation_in.receive().facts == (3.0,)
        if links.activation_out:
            links.activation_out.send(Message(step, Kind.TRAIN, facts=(3.0,)))
    for _, links in reversed(stages):
        if links.gradient_in and gradients:
            assert links.gradient_in.receive().facts == ()
        if links.gradient_out and gradients:
            links.gradient_out.send(Message(step, Kind.TRAIN))
    return [signals.decided for signals, _ in stages]


@pytest.mark.parametrize("who", range(4))
def test_a_request_of_any_stage_is_granted_by_all_after_the_next_batch_that_hears_of_it(who):
    stages = chain(4)
    assert batch(stages, 0) == 4 * [Ask.NOTHING]
    stages[who][0].ask(Ask.STOP)
    found = [batch(stages, step) for step in (1, 2)]
    assert all(len(set(decided)) == 1 for decided in found)
    assert [decided[0] for decided in found] == [Ask.NOTHING if who else Ask.STOP, Ask.STOP]


def test_a_granted_request_stays_granted_and_another_one_adds_up():
    stages = chain(2)
    stages[0][0].ask(Ask.STOP)
    batch(stages, 0)
    stages[1][0].ask(Ask.LEAVE)
    batch(stages, 1)
    assert batch(stages, 2) == 2 * [Ask.STOP | Ask.LEAVE]


def test_what_is_decided_for_a_batch_does_not_change_in_it():
    stages = chain(2)
    signals, _ = stages[0]
    signals.begin()
    signals.ask(Ask.STOP)
    assert signals.decided == Ask.NOTHING


def test_a_process_that_is_to_end_is_heard_of_where_nothing_comes_back():
    stages = chain(3, board=Board())
    stages[2][0].ask(Ask.LEAVE)
    assert batch(stages, 0, gradients=False) == 3 * [Ask.LEAVE]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_notice_to_stop_counts_only_when_a_message_would_have_come(staleness):
    """Else the batch would depend on the notice's speed; a message takes `staleness + 2` batches a stage."""
    stages = chain(3, staleness, Board())
    stages[2][0].ask(Ask.STOP)
    decided = [batch(stages, step, gradients=False) for step in range(3 * (staleness + 2) + 3)]
    assert all(len(set(found)) == 1 for found in decided)
    first = [found[0] for found in decided].index(Ask.STOP)
    assert first > 2 * (staleness + 2)


def test_a_decision_that_was_made_together_holds():
    signals = Signals(1, 2, 0)
    signals.settle(Ask.STOP)
    assert signals.decided == Ask.STOP


def test_a_watch_brings_notices():
    assert issubclass(Watch, Notices)
