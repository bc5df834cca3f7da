"""Where a strategy's options come from, and that each reaches the engine."""

import inspect
import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
import torch
from fits import BOUNDARIES, CLASSES, LINEAR, Net, different, dni, fit, net, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from lightning_dni import DNIDDPStrategy, DNIStrategy
from lightning_dni.core import DNIEngine
from lightning_dni.estimators import CriticEstimator, ZeroEstimator
from lightning_dni.strategies.options import DNIOptions


class Configured(Net):
    """Brings its own options, as `Trainer(strategy="dni")` needs."""

    def configure_dni(self):
        return {"boundaries": BOUNDARIES, "estimator": LINEAR}


def configured(returns):
    """A module whose `configure_dni` returns just that."""

    class Returns(Net):
        def configure_dni(self):
            return returns

    torch.manual_seed(0)
    return Returns()


def arguments(callable_):
    return {
        n: p.default for n, p in inspect.signature(callable_).parameters.items() if p.default is not p.empty
    }


# ---- one set of options, three ways to give them


def test_strategy_module_and_engine_take_the_same_options_with_the_same_defaults():
    options = {f.name for f in fields(DNIOptions)}
    of_replica = {"seed", "exchange", "rank"}
    of_engine = set(inspect.signature(DNIEngine).parameters) - {"model"} - of_replica
    of_strategy = set(inspect.signature(DNIStrategy).parameters) - {"checkpoint_io", "precision_plugin"}
    assert options == of_engine == of_strategy
    defaults = arguments(DNIOptions)
    assert {k: v for k, v in arguments(DNIEngine).items() if k not in of_replica} == defaults
    assert {k: v for k, v in arguments(DNIStrategy).items() if k in defaults} == defaults
    in_processes = arguments(DNIDDPStrategy)
    assert {k: v for k, v in in_processes.items() if k in arguments(DNIStrategy)} == arguments(DNIStrategy)
    of_ddp = {"process_group_backend", "timeout", "start_method"}
    assert in_processes.keys() - arguments(DNIStrategy).keys() == {*of_ddp, "bucket_cap_mb"}
    assert {k: in_processes[k] for k in of_ddp} == {k: arguments(DDPStrategy)[k] for k in of_ddp}


def test_a_strategy_by_name_is_the_strategy_with_the_modules_options():
    torch.manual_seed(0)
    named, passed = Configured(), net()
    trainer = fit(named, "dni")
    fit(passed, dni())
    assert isinstance(trainer.strategy, DNIStrategy)
    assert different(weights(named), weights(passed)) == []


@pytest.mark.parametrize("name", ["dni", "DNI"])
def test_the_name_is_found_in_any_case(name):
    assert fit(Configured(), name, fast_dev_run=True).strategy.strategy_name == "dni"


def test_a_strategy_without_arguments_asks_the_module_too():
    strategy = DNIStrategy()
    fit(Configured(), strategy, fast_dev_run=True)
    assert strategy.engine.boundaries == tuple(BOUNDARIES)


def test_what_the_constructor_says_comes_before_what_the_module_says():
    strategy = DNIStrategy(boundaries=["net.0"], estimator=ZeroEstimator)
    fit(Configured(), strategy, fast_dev_run=True)
    assert strategy.engine.describe()["estimators"] == {"net.0": "ZeroEstimator"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("bp_lambda", 0.5), ("loss_denominator", "sum"), ("estimator_steps", 2), ("rng", "stage")],
)
def test_an_option_without_boundaries_is_not_lost_in_silence(name, value):
    """The module's `configure_dni` names the boundaries: what the constructor was told cannot vanish."""
    with pytest.raises(MisconfigurationException, match=name):
        DNIStrategy(**{name: value})


def test_the_hook_is_asked_once_per_fit_with_the_module_already_configured():
    calls = []

    class Late(Net):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            self.net = self.made

        def configure_dni(self):
            calls.append(self.net is not None)
            return {"boundaries": BOUNDARIES, "estimator": LINEAR}

    fit(Late(), "dni", fast_dev_run=True)
    assert calls == [True]


# ---- refused


@pytest.mark.parametrize(
    "given", [{"boundaries": BOUNDARIES}, {"estimator": LINEAR}], ids=lambda d: next(iter(d))
)
def test_boundaries_and_estimator_belong_together(given):
    with pytest.raises(MisconfigurationException, match="Expected `boundaries` and `estimator` together"):
        DNIStrategy(**given)


@pytest.mark.parametrize("strategy", ["dni", DNIStrategy], ids=["by name", "instance"])
def test_a_module_without_options_is_told_its_children(strategy):
    made = strategy if isinstance(strategy, str) else strategy()
    with pytest.raises(MisconfigurationException, match=r"no `configure_dni\(\)`.*children are \['net'\]"):
        fit(net(), made)


@pytest.mark.parametrize(
    ("returns", "got"),
    [
        pytest.param(None, "got NoneType", id="nothing"),
        pytest.param(BOUNDARIES, "got list", id="a list"),
        pytest.param({"boundaries": BOUNDARIES}, r"got \['boundaries'\]", id="no estimator"),
        pytest.param({"estimator": LINEAR}, r"got \['estimator'\]", id="no boundaries"),
        pytest.param({"boundaries": BOUNDARIES, "estimator": LINEAR, "lambda": 1}, "'lambda'", id="unknown"),
        pytest.param({"boundaries": BOUNDARIES, "estimator": LINEAR, 3: 4}, "3", id="unknown, not a word"),
    ],
)
def test_other_returns_of_the_hook_are_refused_by_name(returns, got):
    expected = rf"(?s)Expected Returns.configure_dni\(\) to return a dict with 'boundaries'.*{got}"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(configured(returns), "dni")


WRONG_TYPES = """
import logging, warnings
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import torch
from fits import dni, fit, net
for options in (
    {"boundaries": "net.0"},
    {"loss_denominator": "mean"},
    {"rng": "mine"},
    {"estimator": lambda spec: torch.nn.Linear(8, 8)},
    {"estimator_steps": 1.5},
    {"bp_lambda": None},
    {"on_nonfinite": "ignore"},
    {"boundaries": None, "truncations": ["net"], "damping": "0.1"},
    {"sequence_end": "stop"},
):
    try:
        fit(net(), dni(**options))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "))
"""


def test_arguments_of_a_wrong_type_are_named_where_no_type_checker_runs(pytestconfig):
    """As users import the package."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG_TYPES],
        cwd=pytestconfig.rootpath / "tests",
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line[:62] for line in done.stdout.splitlines()] == [
        "BoundaryError: Expected `boundaries` to be a non-empty list of submodule names"[:62],
        "EstimatorError: Expected `loss_denominator` to be one of ('batch', 'sum'"[:62],
        "EstimatorError: Expected `rng` to be 'global' or 'stage', but got 'mine'."[:62],
        "EstimatorError: Expected `estimator` to make a GradientEstimator for b"[:62],
        "EstimatorError: Expected `estimator_steps` to be an integer of at least 1"[:62],
        "EstimatorError: Expected `bp_lambda` to be in [0, 1], but got None for"[:62],
        "EstimatorError: Expected `on_nonfinite` to be 'raise' or 'skip', but g"[:62],
        "EstimatorError: Expected `damping` to be above 0 and up to 1, but got '0"[:62],
        "EstimatorError: Expected `sequence_end` to be 'zero' or 'ignore', but g"[:62],
    ]


# ---- each option arrives


def observed(**options):
    strategy = dni(**options)
    fit(net(), strategy, fast_dev_run=3)
    return strategy.engine


@pytest.mark.parametrize(
    ("option", "key", "expected"),
    [
        ({"boundaries": ["net.[01]"]}, "boundaries", BOUNDARIES),
        ({"boundaries": ["net.1", "net.0"]}, "boundaries", BOUNDARIES),
        ({"bp_lambda": 0.25}, "bp_lambda", {"net.0": 0.25, "net.1": 0.25}),
        ({"bp_lambda": {"net.0": 1.0, "*": 0.0}}, "bp_lambda", {"net.0": 1.0, "net.1": 0.0}),
        ({"loss_denominator": "sum"}, "loss_denominator", "sum"),
        ({"estimator_steps": 3}, "estimator_steps", 3),
        ({"rng": "stage"}, "rng", "stage"),
        (
            {"estimator": {"net.0": ZeroEstimator, "*": LINEAR}},
            "estimators",
            {"net.0": "ZeroEstimator", "net.1": "LinearEstimator"},
        ),
        (
            {"estimator_optimizer": partial(torch.optim.SGD, lr=0.5)},
            "estimator_optimizers",
            [{"name": "SGD", "lr": 0.5}],
        ),
        (
            {
                "estimator_optimizer": partial(torch.optim.SGD, lr=0.5),
                "estimator_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
            },
            "estimator_optimizers",
            [{"name": "SGD", "lr": 0.0625}],
        ),
        ({"estimator_clip_norm": 0.25}, "estimator_clip_norm", 0.25),
        ({"on_nonfinite": "skip"}, "on_nonfinite", "skip"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_reaches_the_engine(option, key, expected):
    assert observed(**option).describe()[key] == expected


@pytest.mark.parametrize(
    "labels", [1, -1, lambda batch: batch[1]], ids=["index", "negative index", "callable"]
)
def test_labels_are_taken_where_the_user_says(labels):
    conditioned = observed(labels=labels).estimators["net.0"].conditioning.weight
    assert torch.equal(conditioned, observed().estimators["net.0"].conditioning.weight)


def test_a_critic_is_told_the_output_that_the_user_names():
    class WithoutForward(Net):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    critic = partial(CriticEstimator, num_classes=CLASSES)
    torch.manual_seed(0)
    strategy = dni(estimator=critic, output="net")
    fit(WithoutForward(), strategy)
    assert all(bool(p.any()) for p in strategy.engine.estimators["net.0"].parameters())
