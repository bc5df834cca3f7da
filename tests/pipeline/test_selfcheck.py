"""The self-check finds what a trace cannot see, and names where."""

import copy
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from core.nets import same_bits
from pipeline.chain import buffers_of, grads_of
from pipeline.families import CLASSES, Net, block, mlp
from pipeline.nets import classify, traced, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.keeping import RandomState
from lightning_dni.pipeline.selfcheck import check_split


def remembering(model, batch):
    """The loss has a part that depends on an earlier stage through a number."""
    h = model.a(batch[0])
    model.memory.append(float(model.a[0].weight.detach().sum()))
    return F.cross_entropy(model.d(model.c(model.b(h))), batch[1]) * model.memory[-1]


def noise_after_dropout(model, batch):
    """What is drawn between the stages differs where a random module was skipped."""
    h = model.a(batch[0])
    noise = torch.randn(6, CLASSES)
    return F.mse_loss(model.d(model.c(model.b(h))), noise)


class Counting(nn.Module):
    """Another output with every run, by what no check can put back."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs = nn.Linear(6, 6), itertools.count(1)

    def forward(self, h):
        return self.linear(h) * next(self.runs)


class Returning(Net):
    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        return self.d(h)


def list_of_calls(model, batch):
    loss = classify(model, batch)
    return {"loss": loss, "extra": [loss.detach()] * next(model.calls)}


def with_lists(**parts):
    net = Net(**parts)
    net.memory, net.calls = [], itertools.count(1)
    return net


WRONG = {
    "noise": (
        lambda: Net(a=nn.Sequential(block(5, 6), nn.Dropout(0.5))),
        noise_after_dropout,
        r"what the step returns differs by \d.*Something passes",
    ),
    "output": (lambda: Net(a=block(5, 6), b=Counting()), classify, r"activation at boundary 'b' differs by"),
    "loss": (lambda: Net(c=Counting()), classify, r"what the step returns differs by"),
    "number of results": (
        with_lists,
        list_of_calls,
        r"what the whole model's step does, 3 tensors, but got 4",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_split_that_computes_something_else_is_found(kind):
    make, step, says = WRONG[kind]
    model = make()
    plan, step = traced(model, ["b"], step)
    with pytest.raises(StageError, match=says):
        check_split(model, plan, step)


def test_a_number_from_another_stages_parameter_is_found():
    model = with_lists()
    plan, step = traced(model, ["b"], remembering)
    with pytest.raises((StageError, BoundaryError), match="below boundary 'b'"):
        check_split(model, plan, step)


def test_a_gradient_that_a_stage_changes_is_found():
    """A gradient hook that scales more with every call stands for a backward pass that is not the same."""
    model, calls = Net(), []
    plan, step = traced(model, ["b"])
    model.a[0].weight.register_hook(lambda grad: calls.append(1) or grad * len(calls))
    says = r"the gradient of 'a.0.weight' on stage 0 differs by \d.*Something passes"
    with pytest.raises(StageError, match=says):
        check_split(model, plan, step)


def test_a_buffer_that_a_stage_changes_is_found():
    class Averaging(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(6))
            self.numbers = iter(range(1, 9))

        def forward(self, x):
            h = self.a(x)
            self.average.add_(next(self.numbers))
            return self.d(self.c(self.b(h)))

    model = Averaging()
    plan, step = traced(model, ["b"])
    with pytest.raises(StageError, match=r"buffer 'average' differs by 1\."):
        check_split(model, plan, step)


def test_a_wrong_plan_is_found():
    model = mlp()
    plan, step = traced(model, ["0", "2"])
    wrong = dataclasses.replace(plan, tensors={**plan.tensors, "1.0.weight": 2})
    with pytest.raises(StageError, match=r"activation at boundary '2' differs by nan"):
        check_split(model, wrong, step)
    kept = dataclasses.replace(wrong, shared=frozenset({"1.0.weight"}))
    with pytest.raises(StageError, match=r"gradient of '1.0.weight' on stage 2 is missing"):
        check_split(model, kept, step)
    kept = dataclasses.replace(kept, tensors={**plan.tensors, "1.0.weight": 0})
    with pytest.raises(StageError, match=r"stage 1 to differentiate its own.*'1.0.weight' of stage 0 got"):
        check_split(model, kept, step)


def test_a_boundary_inside_of_a_checkpoint_is_found():
    class Checkpoints(Net):
        def forward(self, x):
            together = lambda h: self.c(self.b(h))
            return self.d(checkpoint(together, self.a(x), use_reentrant=False))

    model = Checkpoints()
    plan, step = traced(model, ["b"])
    with pytest.raises(StageError, match=r"stage 1 to be differentiated alone.*boundaries out of"):
        check_split(model, plan, step)


@pytest.mark.parametrize("backward", [True, False])
def test_the_check_leaves_everything_as_it_was_also_when_it_fails(backward):
    model = Net(a=nn.Sequential(block(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)), b=Counting())
    if backward:
        classify(model, vectors()).backward()
    plan, step = traced(model, ["a", "b"])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = {n: None if g is None else g.clone() for n, g in grads_of(model).items()}
    buffers, state, numpy = buffers_of(model), torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(StageError, match="activation at boundary 'b'"):
        check_split(model, plan, step)
    assert same_bits(dict(model.named_parameters()), weights)
    assert same_bits(grads_of(model), grads)
    assert same_bits(buffers_of(model), buffers)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy).all()
    assert all("_compiled_call_impl" not in vars(m) for m in model.modules())


def test_numbers_drawn_from_numpy_agree():
    def mixed(model, batch):
        share = np.random.rand()
        return classify(model, (batch[0] * share, batch[1])) * share

    model = Net()
    plan, step = traced(model, ["a", "b"], mixed)
    check_split(model, plan, step)


def test_all_generators_go_on_where_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = RandomState(torch.device("cpu"))
    first = draw()
    assert draw() != first
    state.restore()
    assert draw() == first


def test_without_a_gradient_the_outputs_are_compared():
    model = Net(c=Counting()).eval()
    step_of = lambda model, batch: model(batch[0])
    plan, step = traced(model, ["b"], step_of, grad=False)
    with torch.no_grad(), pytest.raises(StageError, match="what the step returns differs"):
        check_split(model, plan, step)
    twin = copy.deepcopy(Net()).eval()
    plan, step = traced(twin, ["b"], step_of, grad=False)
    with torch.no_grad():
        check_split(twin, plan, step)


class Counted(nn.Module):
    """Counts its runs in every way that an attribute has."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs = nn.Linear(6, 6), 0
        self.seen, self.by_name, self.total = [], {}, torch.zeros(())

    def forward(self, h):
        self.runs += 1
        self.seen.append(self.runs)
        self.by_name[self.runs] = self.late = True
        self.total += 1.0
        return self.linear(h) * self.runs * self.total * len(self.seen) * len(self.by_name)


def test_what_a_stage_counts_in_attributes_is_as_in_one_run_and_as_before():
    model = Net(a=nn.Sequential(block(5, 6), Counted()), c=Counted())
    plan, step = traced(model, ["a", "b"])
    check_split(model, plan, step)
    for counted in (model.a[1], model.c):
        assert (counted.runs, counted.seen, counted.by_name, float(counted.total)) == (0, [], {}, 0.0)
        assert not hasattr(counted, "late")
