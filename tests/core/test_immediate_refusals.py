"""What cannot be updated while the forward pass runs is refused by name."""

import pytest
import torch
from core.nets import CLASSES, Told, attached, blobs, mlp, run_step, unchecked
from core.paper import BOUNDARIES, WIDTHS, immediate
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.estimators import LinearEstimator


def test_weights_that_modules_of_two_stages_share_are_refused_by_name():
    model = mlp((5, 6, 6, 6, CLASSES))
    model[2][0].weight = model[1][0].weight
    engine = DNIEngine(model, BOUNDARIES, Told, update="immediate")
    expected = (
        r"in one stage with update='immediate', but '2.0.weight' is also '1.0.weight'.*Pass update='step'"
    )
    with pytest.raises(StageError, match=expected):
        engine.attach()
    attached(model, BOUNDARIES, update="step").detach()
    attached(model, ["0", "2"], update="immediate").detach()  # now they are in one stage


class Once(nn.Module):
    """Three stages; `twice` says what of the first one is used again above."""

    def __init__(self, twice):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last, self.twice = nn.Linear(5, CLASSES), twice

    def forward(self, x):
        h = self.second(self.first(x))
        if self.twice == "module":
            h = self.first(h)
        return self.last(F.linear(h, self.first.weight) if self.twice == "weight" else h)


@pytest.mark.parametrize(
    ("twice", "loss_of", "consumer"),
    [
        ("module", F.cross_entropy, "boundary 'first'"),
        ("weight", F.cross_entropy, "the loss"),
        ("nothing", None, "the loss"),
    ],
)
def test_what_comes_to_a_stage_that_has_stepped_is_refused(twice, loss_of, consumer):
    model = Once(twice).double()
    penalized = lambda out, y: F.cross_entropy(out, y) + model.first.weight.square().sum()
    engine = immediate(model, ["first", "second"])
    expected = rf"but {consumer} comes to \['first.weight'.*updated already in this forward pass.*no_grad"
    with pytest.raises(StageError, match=expected):
        run_step(engine, model, blobs(), loss_of or penalized)


def test_a_second_forward_pass_is_refused_but_for_looking():
    engine = immediate(model := mlp(WIDTHS), BOUNDARIES)
    x, y = blobs()
    with engine.training_step((x, y)):
        model(x)
        with torch.no_grad():
            model(x)
        with pytest.raises(StageError, match=r"comes to .*a second forward pass"):
            model(x)


def test_an_optimizer_with_a_state_of_whole_groups_is_refused():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    model = mlp(WIDTHS)
    engine = immediate(model, optimizer=(user := Counting(model.parameters(), 0.1)))
    with pytest.raises(StageError, match=r"the step of Counting changes \['k'\] of a whole group"):
        run_step(engine, model, blobs())
    assert len(user.param_groups[0]["params"]) == len(list(model.parameters()))


class OwnCounter(torch.optim.SGD):
    """Counts its steps as optimizers written by hand do, to correct a bias."""

    t = 0

    def step(self, closure=None):
        self.t += 1
        return super().step(closure)


class Wraps(torch.optim.Optimizer):
    """A wrapper whose steps are another one's."""

    def __init__(self, params, lr):
        self.base = OwnCounter(params, lr)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure=None):
        return self.base.step(closure)


class OwnTensor(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.seen = torch.zeros(())

    def step(self, closure=None):
        self.seen.add_(1)
        return super().step(closure)


class InState(torch.optim.SGD):
    def step(self, closure=None):
        self.state["all"]["t"] = self.state["all"].get("t", 0) + 1
        return super().step(closure)


class GroupTensor(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["seen"] = torch.zeros(())

    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"].add_(1)
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(OwnCounter, "t"), (Wraps, "t"), (OwnTensor, "seen"), (InState, "all"), (GroupTensor, "seen")],
)
def test_an_optimizer_with_a_state_of_its_own_is_refused(kind, name):
    """It stepped once per stage: Adam written by hand corrected its bias with the wrong number."""
    model = mlp(WIDTHS)
    engine = immediate(model, optimizer=kind(model.parameters(), 0.1))
    with pytest.raises(StageError, match=rf"the step of {kind.__name__} changes \['{name}'\] of .* its own"):
        run_step(engine, model, blobs())


def test_without_an_updater_nothing_can_step():
    engine = attached(mlp(), ["0"], update="immediate")
    with (
        pytest.raises(StageError, match=r"Expected `engine.updater`.*SplitOptimizer\(optimizer\)"),
        engine.training_step(blobs()),
    ):
        pass


def test_several_losses_are_refused():
    engine = immediate(mlp())
    with (
        pytest.raises(StageError, match="one loss per training step with update='immediate'"),
        engine.training_step(blobs(), several_losses=True),
    ):
        pass


def test_replicas_are_refused():
    with unchecked(), pytest.raises(StageError, match="Expected no replicas with update='immediate'"):
        DNIEngine(mlp(), ["0"], Told, update="immediate", exchange=object())


def test_another_time_is_refused():
    expected = "Expected `update` to be 'step' or 'immediate', but got 'now'"
    with unchecked(), pytest.raises(EstimatorError, match=expected):
        DNIEngine(mlp(), ["0"], LinearEstimator, update="now")
