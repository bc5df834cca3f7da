"""`strategy.describe()` prints what is trained how, without training it."""

from functools import partial

import pytest
import torch
from fits import BOUNDARIES, FEATURES, LINEAR, AtBatchStart, Net, attributes, dni, fit, hooks_on, loader, net
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dni import DNIStrategy
from lightning_dni.core import GradientEstimator, Lock
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import (
    CriticEstimator,
    DirectFeedbackAlignmentEstimator,
    LocalLossEstimator,
    ZeroEstimator,
)
from lightning_dni.strategies.options import DNIOptions
from lightning_dni.strategies.table import stages

LOWEST, MIDDLE, TOP = FEATURES * 8 + 8, 8 * 8 + 8, 8 * 3 + 3


def rows(module=None, boundaries=BOUNDARIES, estimator=LINEAR, **options):
    made = DNIOptions(boundaries=list(boundaries), estimator=estimator, **options)
    return stages(net() if module is None else module, made)


def sizes(*args, **options):
    return [int(row[1].replace(",", "")) for row in rows(*args, **options)]


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        (["net.0"], [LOWEST, MIDDLE + TOP]),
        (["net.1"], [LOWEST + MIDDLE, TOP]),
        (["net.0", "net.1"], [LOWEST, MIDDLE, TOP]),
        (["net.1", "net.0"], [LOWEST, MIDDLE, TOP]),
        (["net.0.0", "net.1.0"], [LOWEST, MIDDLE, TOP]),
        (["net.0.1", "net.1.1"], [LOWEST, MIDDLE, TOP]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_each_stage_counts_the_parameters_up_to_its_boundary(boundaries, expected):
    """Also where the boundary is an activation, which has no parameters of its own."""
    assert sizes(boundaries=boundaries) == expected


def test_frozen_parameters_are_not_counted():
    module = net()
    module.net[0].requires_grad_(False)
    assert sizes(module) == [0, MIDDLE, TOP]


def test_a_shared_weight_is_counted_once():
    module = Net(width=FEATURES)
    module.net[1][0].weight = module.net[0][0].weight
    assert sum(sizes(module)) == sum(p.numel() for p in module.parameters())


def test_rows_are_in_forward_order_with_the_last_stage_at_the_end():
    assert [row[0] for row in rows(boundaries=["net.1", "net.0"])] == [*BOUNDARIES, "(last stage)"]


@pytest.mark.parametrize(
    ("estimator", "learns"),
    [(ZeroEstimator, "no"), (LINEAR, "yes"), (LocalLossEstimator, "no"), (CriticEstimator, "yes")],
)
def test_it_says_what_learns_from_the_network_above(estimator, learns):
    name = getattr(estimator, "func", estimator).__name__
    assert {row[2:4] for row in rows(estimator=estimator)[:-1]} == {(name, learns)}


def test_it_says_what_each_stage_waits_for():
    class Locked(GradientEstimator):
        locks = frozenset({Lock.UPDATE})

        def synthesize(self, h, context, state):
            return None, None

    by_boundary = {"net.0": Locked, "net.1": LINEAR}
    assert [row[4] for row in rows(estimator=by_boundary)] == ["update", "nothing", "nothing"]
    mixed = rows(bp_lambda={"net.0": 0.0, "net.1": 0.5})
    assert [row[4] for row in mixed] == ["nothing", "the loss (bp_lambda > 0)", "nothing"]


def test_an_option_that_makes_a_stage_wait_is_read_off_a_partial():
    assert rows(estimator=partial(LINEAR, prop_alpha=0.5))[0][4] == "backward, update"
    assert rows(estimator=partial(LINEAR, prop_alpha=0.0))[0][4] == "nothing"
    assert rows(estimator=DirectFeedbackAlignmentEstimator)[0][4] == "update"


def test_a_factory_that_cannot_be_read_is_not_guessed_at():
    def choose(spec):
        return ZeroEstimator(spec)

    assert rows(estimator=choose)[0][2:4] == ("choose", "known on the first batch")


# ---- printed


def test_the_table_is_printed_and_nothing_is_trained(capsys):
    module = net()
    before, state = attributes(module), torch.get_rng_state()
    dni().describe(module)
    printed = capsys.readouterr().out
    for word in (*BOUNDARIES, "(last stage)", "LinearEstimator", str(LOWEST), str(MIDDLE), str(TOP), "Net"):
        assert word in printed
    assert torch.equal(state, torch.get_rng_state())
    assert attributes(module) == before
    assert hooks_on(module) == 0


def test_the_table_can_be_printed_from_inside_a_fit(capsys):
    strategy = dni()
    fit(net(), strategy, loader(8), callbacks=[AtBatchStart(lambda *_: strategy.describe())])
    assert "LinearEstimator" in capsys.readouterr().out


def test_the_modules_own_options_are_described(capsys):
    class Configured(Net):
        def configure_dni(self):
            return {"boundaries": ["net.1"], "estimator": ZeroEstimator}

    DNIStrategy().describe(Configured())
    assert "ZeroEstimator" in capsys.readouterr().out


def test_a_module_that_is_empty_as_a_collection_can_be_described(capsys):
    class Countable(Net):
        def __len__(self):
            return 0

    dni().describe(Countable())
    assert "Countable" in capsys.readouterr().out


def test_without_a_module_there_is_nothing_to_describe():
    with pytest.raises(MisconfigurationException, match=r"Call `strategy\.describe\(module\)`"):
        dni().describe()


def test_an_unknown_boundary_is_named_before_anything_is_printed(capsys):
    with pytest.raises(BoundaryError, match="Expected `boundaries` to name submodules"):
        dni(boundaries=["net.7"]).describe(net())
    assert capsys.readouterr().out == ""


def test_the_table_is_right_for_modules_without_a_sequential():
    class Branch(Net):
        def __init__(self):
            super().__init__()
            del self.net
            self.stem, self.act, self.top = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    assert sizes(Branch(), boundaries=["act"]) == [LOWEST, TOP]
