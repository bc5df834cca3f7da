"""Two networks at two clock rates: what is counted, what is written, and what comes back to the letters."""

import itertools
from functools import partial

import pytest
import torch
from core.recurrent import Told
from fits import quiet_trainer
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_dni import DNIStrategy
from lightning_dni.core import DNIEngine
from lightning_dni.demos import ClocksDataModule, TwoClocksModel
from lightning_dni.estimators import LinearEstimator

PERIOD, ROWS = 3, 5


def read(locked, number):
    data = ClocksDataModule(PERIOD, locked, ROWS, seed=1)
    data.setup()
    return list(itertools.islice(data.train_dataloader(), number)), data


def test_a_window_is_the_same_whole_and_by_ticks_and_its_digits_are_counted():
    (first, second), data = read(True, 2)
    split = data._digits.splits.train
    classes = {tuple(x.flatten().tolist()): int(y) for x, y in split}
    shown = [[[classes[tuple(x.tolist())] for x in rows] for rows in tick] for tick in first.digits]
    shown = torch.tensor(shown)
    assert shown.shape == (PERIOD, PERIOD, ROWS)
    assert torch.equal(first.odd, (shown % 2 == 1).sum(1))
    assert torch.equal(first.wanted, (shown == 3).sum((0, 1)))
    assert torch.equal(second.before, first.wanted)
    assert first.wanted.any()
    ticks, _ = read(False, 2 * PERIOD)
    for window, parts in ((first, ticks[:PERIOD]), (second, ticks[PERIOD:])):
        for k, whole in enumerate(window[:2]):
            assert torch.equal(torch.cat([part[k] for part in parts]), whole)
        assert all(torch.equal(part.wanted, window.wanted) for part in parts)
        assert all(torch.equal(part.before, window.before) for part in parts)


def test_others_validate_than_train_and_the_same_for_every_seed():
    data = [ClocksDataModule(PERIOD, batch_size=ROWS, seed=seed) for seed in (0, 1)]
    for each in data:
        each.setup()
    (one,), (other,) = (list(each.val_dataloader()) for each in data)
    assert torch.equal(one.digits, other.digits)
    seen = {tuple(x.flatten().tolist()) for x, _ in data[0]._digits.splits.train}
    assert not any(tuple(x.tolist()) in seen for x in one.digits[:, :, :20].flatten(0, 2))


def model_and_losses():
    """A model in double precision, and what backprop through a whole window and the next tick gives."""
    torch.manual_seed(0)
    model = TwoClocksModel(PERIOD, hidden_size=6, letter_size=2).double()
    ticks = [t._replace(digits=t.digits.double()) for t in read(False, PERIOD + 1)[0]]
    mail, losses = None, []
    for tick in ticks[:PERIOD]:
        (odd, answer), mail = model.clocks(tick.digits[0], mail)
        assert answer is None
        losses.append(F.cross_entropy(odd, tick.odd[0]))
    letters, written = mail
    assert written == PERIOD
    losses.append(F.cross_entropy(model.clocks.read(letters), ticks[-1].before))
    (back,) = torch.autograd.grad(losses[-1], letters, retain_graph=True)
    (odd, answer), (fresh, written) = model.clocks(ticks[-1].digits[0], (letters, written))
    assert written == 1
    assert not fresh[:, 2:].any()
    losses.append(F.cross_entropy(odd, ticks[-1].odd[0]))
    torch.stack(losses).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return model, ticks, back, expected


def test_with_the_true_gradient_at_the_mail_it_is_backprop_through_both_networks():
    """The fast network steps without the slow one, whose gradient the estimator is taught."""
    model, ticks, back, expected = model_and_losses()
    estimator = partial(Told, says=[(back * ROWS,)] * PERIOD + [None])
    engine = DNIEngine(model, [], estimator, truncations=["clocks"], labels="wanted")
    with engine:
        for k, tick in enumerate(ticks):
            engine.request_report()
            with engine.training_step(tick):
                loss = model.training_step(tick, k)
            engine.backward(loss)
            assert (model.clocks.slow.weight_hh_l0.grad is None) == (k < PERIOD)
        target = engine.last_report.boundaries["clocks"].target
    assert_close(target, back * ROWS, rtol=1e-10, atol=1e-12)
    assert_close([p.grad for p in model.parameters()], expected, rtol=1e-10, atol=1e-12)


def test_a_whole_window_is_backprop_and_a_tick_gives_its_letter_no_gradient():
    model, ticks, _, _ = model_and_losses()
    (window,), _ = read(True, 1)
    model.training_step(window._replace(digits=window.digits.double()), 0).backward()
    assert model.clocks.write.weight.grad.any()
    model.zero_grad()
    for k, tick in enumerate(ticks):
        model.training_step(tick, k).backward()
    assert model.clocks.write.weight.grad is None
    assert model.clocks.slow.weight_hh_l0.grad.any()


@pytest.mark.parametrize("locked", [False, True])
def test_a_fit_logs_both_counts_over_the_digits_seen(locked):
    strategy = (
        "auto" if locked else DNIStrategy(truncations=["clocks"], estimator=LinearEstimator, labels=None)
    )
    steps = 2 if locked else 2 * PERIOD
    trainer = quiet_trainer(strategy, max_steps=steps, max_epochs=-1, val_check_interval=steps)
    trainer.fit(TwoClocksModel(PERIOD, hidden_size=4), ClocksDataModule(PERIOD, locked, ROWS))
    found = trainer.callback_metrics
    assert {"odd", "threes"} <= set(found)
    assert found["step"] == 2 * PERIOD**2
    assert locked or strategy.engine.estimators["clocks"].map.weight.any()


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (ClocksDataModule, {"period": 1}, "`period` to be an integer of at least 2"),
        (ClocksDataModule, {"batch_size": 0}, "`batch_size` to be an integer of at least 1"),
        (TwoClocksModel, {"letter_size": 0}, "`letter_size` to be an integer of at least 1"),
        (TwoClocksModel, {"learning_rate": 0.0}, "`learning_rate` to be a finite number above 0"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
