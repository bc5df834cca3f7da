"""What was changed since the checkpoint is refused by name, or is what the user sees: never silent."""

import copy
import re
from functools import partial

import pytest
import torch
from fits import BOUNDARIES, CLASSES, LINEAR, different, dni, fit, hooks_on, loader, net, weights
from strategies.loops import MLP
from torch import nn

from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import (
    CriticEstimator,
    LinearEstimator,
    LocalLossEstimator,
    MLPEstimator,
    ZeroEstimator,
)

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
HEADS = {"hidden_sizes": (8,), "num_classes": CLASSES}


def saved(folder, module=None, **options):
    """A checkpoint of one epoch; returns its path."""
    path = folder / "saved.ckpt"
    fit(net() if module is None else module, dni(**options)).save_checkpoint(path)
    return path


def resume(path, module=None, **options):
    strategy = dni(**options)
    module = net(seed=5) if module is None else module
    fit(module, strategy, ckpt_path=path, max_epochs=2)
    return module, strategy


def assert_refused(path, message, error=EstimatorError, module=None, **options):
    """Refused before a step, with nothing trained and no hook left."""
    module = net(seed=5) if module is None else module
    with pytest.raises(error, match=message):
        fit(module, dni(**options), ckpt_path=path, max_epochs=2)
    assert hooks_on(module) == 0
    restored = torch.load(path, weights_only=True)["state_dict"]
    if {n: t.shape for n, t in restored.items()} == {n: t.shape for n, t in weights(module).items()}:
        assert different(restored, weights(module)) == []  # the weights are loaded, and not moved since


# ---- the estimator


@pytest.mark.parametrize(
    ("then", "now"),
    [
        pytest.param(LINEAR, LinearEstimator, id="without labels"),
        pytest.param(LinearEstimator, LINEAR, id="with labels"),
        pytest.param(LINEAR, ZeroEstimator, id="none"),
        pytest.param(MLP, partial(MLPEstimator, hidden_sizes=(9,), num_classes=CLASSES), id="another size"),
        pytest.param(MLP, partial(MLPEstimator, hidden_sizes=(8, 8), num_classes=CLASSES), id="deeper"),
        pytest.param(MLP, partial(MLPEstimator, hidden_sizes=(8,), batch_norm=False, num_classes=CLASSES),
                     id="no batch norm"),
        pytest.param(LINEAR, {"net.0": LINEAR, "net.1": MLP}, id="one of two"),
    ],
)  # fmt: skip
def test_another_estimator_is_refused_with_its_boundary(tmp_path, then, now):
    path = saved(tmp_path, estimator=then)
    assert_refused(path, r"boundary 'net\.[01]'.*Resume with the `estimator` of the saved run", estimator=now)


def test_an_estimator_where_there_was_none_is_refused(tmp_path):
    """ZeroEstimator has no parameters to miss."""
    path = saved(tmp_path, estimator=ZeroEstimator)
    assert_refused(path, "Resume with the `estimator` of the saved run", estimator=LINEAR)


@pytest.mark.parametrize(
    ("then", "now"), [(LocalLossEstimator, CriticEstimator), (CriticEstimator, LocalLossEstimator)]
)
def test_an_estimator_of_another_kind_with_the_same_parameters_is_refused(tmp_path, then, now):
    """A critic that goes on from a local loss's head claims to have learnt what the network does."""
    path = saved(tmp_path, estimator=partial(then, **HEADS))
    assert_refused(path, "Resume with the `estimator`", estimator=partial(now, **HEADS))


def test_another_order_of_boundaries_is_no_change(tmp_path):
    path = saved(tmp_path)
    ends = [
        weights(resume(path, boundaries=order)[0]) for order in (BOUNDARIES, BOUNDARIES[::-1], ["net.[01]"])
    ]
    assert different(ends[0], ends[1]) == different(ends[0], ends[2]) == []


# ---- the width


def test_another_width_is_refused_as_lightning_refuses_it(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.0\.weight"):
        resume(path, net(width=9))


class Tile(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        return x.repeat(1, self.times)


class Untile(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return x[:, : self.width]


def tiled(times, seed=0):
    """`net.1` is a tile of what `net.0` gives: its width is in no weight of the module."""
    module = net(seed)
    module.net = nn.Sequential(module.net[0], Tile(times), nn.Sequential(Untile(8), module.net[2]))
    return module


def test_a_width_that_no_weight_of_the_module_knows_is_refused_in_the_first_step(tmp_path):
    path = saved(tmp_path, tiled(2), boundaries=["net.1"])
    assert_refused(path, r"rows of shapes \[\(24,\)\] at boundary 'net\.1', but got one for \[\(16,\)\]",
                   module=tiled(3, seed=5), boundaries=["net.1"])  # fmt: skip
    resume(path, tiled(2, seed=5), boundaries=["net.1"])


# ---- the estimators' optimizer


OPTIMIZER_CHANGES = {
    "adam to sgd": (ADAM, SGD),
    "sgd to adam": (SGD, ADAM),
    "adam to adamw": (ADAM, partial(torch.optim.AdamW, lr=0.01)),
    "adam to rmsprop": (ADAM, partial(torch.optim.RMSprop, lr=0.01)),
}


@pytest.mark.parametrize("change", OPTIMIZER_CHANGES)
def test_another_estimator_optimizer_is_refused_by_name(tmp_path, change):
    then, now = OPTIMIZER_CHANGES[change]
    path = saved(tmp_path, estimator_optimizer=then)
    assert_refused(path, "estimator_optimizer", estimator_optimizer=now)


APART = {"net.0": ADAM, "*": partial(torch.optim.Adam, lr=0.01)}


def test_one_optimizer_cannot_be_taken_apart(tmp_path):
    path = saved(tmp_path, estimator_optimizer=ADAM)
    assert_refused(path, r"Resume with the `estimator_optimizer` of the saved run", estimator_optimizer=APART)


def test_optimizers_that_were_apart_go_on_apart_under_one_factory(tmp_path):
    path = saved(tmp_path, estimator_optimizer=APART)
    ends = [weights(resume(path, estimator_optimizer=now)[0]) for now in (APART, ADAM)]
    assert different(*ends) == []


def test_a_rate_of_the_estimators_comes_from_the_checkpoint_as_the_users_does(tmp_path):
    """torch restores an optimizer's groups whole: the user's rate from a checkpoint wins as well."""
    path = saved(tmp_path, estimator_optimizer=partial(torch.optim.Adam, lr=0.01))
    other = resume(path, estimator_optimizer=partial(torch.optim.Adam, lr=0.5))
    same = resume(path, estimator_optimizer=partial(torch.optim.Adam, lr=0.01))
    rates = [next(iter(s.engine.describe()["estimator_optimizers"]))["lr"] for _, s in (other, same)]
    assert rates == [0.01, 0.01]
    assert different(weights(other[0]), weights(same[0])) == []


# ---- what a refusal leaves


def test_a_refused_checkpoint_leaves_the_estimators_as_they_were(tmp_path):
    path = saved(tmp_path, estimator={"net.0": LINEAR, "net.1": MLP})
    module, strategy = net(), dni()
    trainer = fit(module, strategy)
    before = {name: copy.deepcopy(e.state_dict()) for name, e in strategy.engine.estimators.items()}
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(EstimatorError, match="Resume with the `estimator`"):
        trainer.fit(module, loader(), ckpt_path=path)
    assert list(strategy.engine.estimators) == list(before)
    for name, estimator in strategy.engine.estimators.items():
        assert different(before[name], estimator.state_dict()) == []


def test_the_estimators_of_one_module_are_not_saved_with_the_weights_of_another(tmp_path):
    """Fit one, validate another, save: the file has the other's weights."""
    trained, other = net(), net(seed=5)
    trainer = fit(trained, dni())
    trainer.validate(other, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = torch.load(tmp_path / "other.ckpt", weights_only=True)
    assert different(checkpoint["state_dict"], weights(other)) == []
    assert "lightning_dni" not in checkpoint


# ---- what may change


@pytest.mark.parametrize(
    "options",
    [
        {"estimator_steps": 3},
        {"loss_denominator": "sum"},
        {"labels": 1},
        {"bp_lambda": 0.5},
        {"rng": "stage"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_holds_no_state_is_what_the_constructor_says(tmp_path, options):
    path = saved(tmp_path)
    (plain, _), (changed, strategy) = resume(path), resume(path, **options)
    same = options in ({"labels": 1}, {"rng": "stage"})  # the same labels; no dropout
    assert (different(weights(plain), weights(changed)) == []) == same
    said = strategy.engine.describe()
    for key, value in options.items():
        if key in said:
            wanted = dict.fromkeys(BOUNDARIES, value) if key == "bp_lambda" else value
            assert said[key] == wanted


def test_the_message_of_a_refusal_is_one_line(tmp_path):
    """Errors of torch that are passed on keep no line breaks and no tabs."""
    path = saved(tmp_path)
    with pytest.raises(EstimatorError) as caught:
        resume(path, estimator=MLP)
    assert not re.search(r"[\n\t]", str(caught.value))
