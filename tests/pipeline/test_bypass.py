"""What goes past a boundary travels with the activations where it can, and is refused by name elsewhere."""

import copy
from functools import partial

import pytest
import torch
from core.nets import CLASSES
from pipeline.staged import OPTIMIZERS, batches, loss_of, train_whole
from pipeline.test_exact import assert_same_bits, either
from pipeline.test_exact import plain as plain_loop
from torch import nn
from torch.utils import _pytree as pytree

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator
from lightning_dni.pipeline.bypass import Bypass, Luggage, Spot
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.splitting import StageRunner
from lightning_dni.pipeline.together import ExactStagesTogether, StagesTogether
from lightning_dni.pipeline.tracing import trace_stages

LINEAR = partial(LinearEstimator, num_classes=CLASSES)
BOUNDARIES = ["a", "b", "c"]
WIDTH = 6


class Rotary(nn.Module):
    """Two tables for the rows at hand, and a mask: no gradient goes there."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.linspace(0, 3, 8).unsqueeze(1) * torch.rand(WIDTH))

    def forward(self, x):
        angles = self.angles[: len(x)]
        return {"waves": (angles.cos(), angles.sin()), "mask": angles > 1}


class Rotated(nn.Module):
    """A layer that reads the tables which somebody has made; or its own."""

    def __init__(self, own):
        super().__init__()
        self.linear, self.rotary = nn.Linear(WIDTH, WIDTH), Rotary() if own else None

    def forward(self, h, tables=None):
        tables = tables if self.rotary is None else self.rotary(h)
        cos, sin = tables["waves"]
        h = torch.tanh(self.linear(h)) * cos + h.flip(-1) * sin
        return h.masked_fill(tables["mask"], 0.5)


class Rotating(nn.Module):
    """Four layers of which all but the first read tables that were made before the first one."""

    def __init__(self, own=False):
        super().__init__()
        self.rotary = None if own else Rotary()
        self.a = nn.Linear(5, WIDTH)
        self.b, self.c, self.d = Rotated(own), Rotated(own), Rotated(own)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        tables = None if self.rotary is None else self.rotary(x)
        h = self.a(x)
        for layer in (self.b, self.c, self.d):
            h = layer(h, tables)
        return self.head(h)


def rotating(own=False):
    torch.manual_seed(0)
    model = Rotating()
    if not own:
        return model
    twin = Rotating(own=True)
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if "rotary" not in n}, strict=False)
    for layer in (twin.b, twin.c, twin.d):
        layer.rotary.load_state_dict(model.rotary.state_dict())
    return twin


def staged(model, data, staleness=0, boundaries=BOUNDARIES):
    sgd = OPTIMIZERS["sgd"]
    return StagesTogether(model, boundaries, LINEAR, loss_of, sgd, data[0], staleness, seed=3)


def exact(model, data, schedule="1f1b", boundaries=BOUNDARIES, loss_of=loss_of):
    options = {"schedule": schedule, "microbatches": 2, "seed": 3}
    return ExactStagesTogether(model, boundaries, loss_of, OPTIMIZERS["sgd"], data[0], **options)


def one_process(model, data, boundaries=BOUNDARIES):
    engine = DNIEngine(model, boundaries, LINEAR, rng="stage", seed=3)
    return train_whole(engine, model, OPTIMIZERS["sgd"](model.parameters()), data)


def split(model, boundaries=BOUNDARIES, loss_of=loss_of, **options):
    """The plan of a model whose stages do what it does, to the bit."""
    batch = batches(1)[0]
    model = copy.deepcopy(model)
    plan = trace_stages(model, boundaries, lambda: loss_of(model, batch), **options)
    check_split(model, plan, lambda: loss_of(model, batch))
    return plan


# ---- what takes no gradient


def test_what_takes_no_gradient_reaches_every_stage_that_reads_it():
    plan = split(rotating())
    assert [(b.made, b.until, b.with_gradient) for b in plan.bypasses] == [(0, 3, False)] * 3


def test_without_lag_stages_are_one_process():
    """With partial batches, so that what travels has other shapes from batch to batch."""
    model, data = rotating(), batches()
    stages = staged(model, data)
    losses = [stages.step([batch]) for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(one_process(model, data)))
    assert_same_bits(stages, model)


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_with_lag_it_is_as_if_every_stage_had_made_its_own(staleness):
    """It belongs to the batch of the activation beside it, not to the newest one."""
    data = batches()
    losses = []
    for own in (False, True):
        stages = staged(rotating(own), data, staleness)
        losses.append(torch.stack([stages.step([batch]) for batch in data]))
    assert torch.equal(*losses)


@either
def test_it_travels_under_exact_schedules_too(schedule):
    model, data = rotating(), batches(20)
    stages = exact(model, data, schedule)
    losses = [stages.step([batch])[0] for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(plain_loop(model, data)))
    assert_same_bits(stages, model)


class Passing(Rotating):
    """The first boundary returns the tables as well, and later layers take them from there."""

    def __init__(self, original):
        super().__init__()
        self.a, self.original = Both(), original

    def forward(self, x):
        tables = self.rotary(x)
        h, passed = self.a(x, tables)
        for layer in (self.b, self.c, self.d):
            h = layer(h, tables if self.original else passed)
        return self.head(h)


class Both(nn.Linear):
    def __init__(self):
        super().__init__(5, WIDTH)

    def forward(self, x, tables):
        return super().forward(x), tables


def test_what_is_part_of_a_boundarys_output_crosses_it_once():
    torch.manual_seed(0)
    plan = split(Passing(original=False))
    assert [(b.rides(0), b.rides(1), b.rides(2)) for b in plan.bypasses] == [(False, True, True)] * 3


def test_what_a_step_returns_may_come_from_below():
    def with_mask(model, batch):
        mask = model.rotary(batch[0])["mask"]
        return {"loss": loss_of(model, batch), "mask": mask}

    assert len(split(rotating(), loss_of=with_mask).bypasses) == 4


def test_a_module_that_runs_on_two_stages_gives_each_its_own():
    class Twice(Rotating):
        def forward(self, x):
            tables = self.rotary(x)
            h = self.b(self.a(x), tables)
            again = self.rotary(x[: len(x)])
            return self.head(self.d(self.c(h, again), again))

    torch.manual_seed(0)
    plan = split(Twice())
    assert {(b.made, b.until) for b in plan.bypasses} == {(0, 1), (2, 3)}


# ---- what takes a gradient


class Skipping(nn.Module):
    """As in a U-Net: what the first layers make meets what the last ones make."""

    def __init__(self, in_place=False):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(inplace=in_place))
        self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.d = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x):
        low = self.a(x)
        middle = self.b(torch.tanh(low))
        high = self.c(torch.tanh(middle) + low)
        return self.d(torch.cat([low, high * middle], 1))


@either
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("boundaries", [["a", "b", "c"], ["b"], ["a.0", "c"]])
def test_exact_schedules_bring_the_gradient_of_a_skip_connection_back(schedule, in_place, boundaries):
    torch.manual_seed(0)
    model, data = Skipping(in_place and boundaries != ["a.0", "c"]), batches(20)
    split(model, boundaries, skips=True)
    stages = exact(model, data, schedule, boundaries)
    losses = [stages.step([batch])[0] for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(plain_loop(model, data)))
    assert_same_bits(stages, model)


def test_beside_synthetic_gradients_it_is_refused():
    torch.manual_seed(0)
    with pytest.raises(BoundaryError, match="skip connection past the boundary"):
        split(Skipping())
    with pytest.raises(BoundaryError, match="A path leaks around boundary"):
        one_process(Skipping(), batches(1))


# ---- what cannot travel


class Changing(Rotating):
    """What takes no gradient is changed in place after a module has returned it."""

    def forward(self, x):
        mask = self.rotary(x)["mask"]
        mask.logical_not_()
        return self.head(self.a(x).masked_fill(mask, 0.5))


def test_what_was_changed_in_place_is_refused():
    torch.manual_seed(0)
    with pytest.raises(BoundaryError, match="skip connection past the boundary"):
        split(Changing(), ["a"])


class Sometimes(Rotating):
    def forward(self, x):
        tables = self.rotary(x) if len(x) > 3 else {"waves": (x.new_ones(()), x.new_zeros(()))}
        return self.head(self.a(x) * tables["waves"][0])


def test_what_is_not_made_in_every_step_is_refused():
    torch.manual_seed(0)
    short, long = batches(2)
    stages = staged(Sometimes(), [long], boundaries=["a"])
    with pytest.raises(
        BoundaryError, match=r"modules \['rotary'\] to return, before the boundary of stage 0"
    ):
        stages.step([short])


class Learned(Rotating):
    """The tables come out of a layer that may be frozen."""

    def __init__(self):
        super().__init__()
        self.rotary = nn.Linear(5, WIDTH).requires_grad_(False)

    def forward(self, x):
        shift = self.rotary(x)
        return self.head(self.b.linear(self.a(x)) + shift)


def test_what_begins_to_take_a_gradient_is_refused():
    torch.manual_seed(0)
    data = batches(2)
    stages = staged(Learned(), data, boundaries=["a"])
    stages.step(data[:1])
    stages.models[0].rotary.requires_grad_(True)
    with pytest.raises(BoundaryError, match="'rotary', which stage 1 reads, to take no gradient, as when"):
        stages.step(data[1:2])


# ---- the pieces


def test_nothing_is_kept_between_two_runs():
    path = (("m", 0),)
    spot = Spot(path, 0, repr(pytree.tree_structure(torch.zeros(2))))
    bypass = Bypass(0, 2, False, frozenset({spot}), frozenset())
    luggage, tensor = Luggage([bypass], 1), torch.zeros(2)
    luggage.begin([], [tensor])
    assert luggage.onward()[0] is tensor
    assert luggage.fill(path, torch.ones(2)) is tensor
    assert torch.equal(luggage.fill((("m", 1),), torch.ones(2)), torch.ones(2))  # a second call
    luggage.end()
    with pytest.raises(BoundaryError, match=r"modules \['m'\]"):
        luggage.onward()


def test_a_stage_of_a_model_without_any_asks_for_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES))
    batch = batches(1)[0]
    plan = trace_stages(model, ["0"], lambda: loss_of(model, batch))
    assert plan.bypasses == ()
    runner = StageRunner(model, plan, 0)
    with runner:
        assert len(runner._calls._placed) == 2
