"""Boundaries that are chosen: the best ones by brute force, and only such as can be cut."""

import itertools
import random
import time
from contextlib import suppress
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from pipeline.families import CLASSES, Net, block, classify, images, mlp, next_token, tokens, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dni.demos.gpt import GPT
from lightning_dni.demos.resnet import ResNet
from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.balance import SLACK, Balance, Candidate, Measured, balance, choose
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.timing import measure
from lightning_dni.pipeline.tracing import trace_stages


def ends(*times, names=None, parameters=None):
    """Candidates that end at these times, and the whole, which ends at the last one."""
    parameters = parameters or range(1, len(times) + 1)
    names = names or [f"m{i}" for i in range(len(times))]
    *found, whole = [Candidate(n, float(t), p) for n, t, p in zip(names, times, parameters, strict=True)]
    return found, whole


def names(chosen):
    return [c.name for c in chosen]


def slowest(chosen, whole):
    times = [0.0, *(c.time for c in chosen), whole.time]
    return max(b - a for a, b in pairwise(times))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_has_a_slowest_stage_that_is_much_faster(seed):
    draw = random.Random(seed)
    found, whole = ends(*sorted(draw.random() for _ in range(9)))
    for stages in (2, 3, 4, 5):
        best = min(slowest(c, whole) for c in combinations(found, stages - 1))
        chosen = choose(found, whole, stages)
        assert len(chosen) == stages - 1
        assert slowest(chosen, whole) <= best * (1 + SLACK)


def test_one_slow_module_leaves_the_rest_even():
    found, whole = ends(1, 2, 3, 4, 104, 105)
    assert names(choose(found, whole, 3)) == ["m3", "m4"]
    found, whole = ends(100, 101, 102, 103, 104)
    assert names(choose(found, whole, 3)) == ["m0", "m2"]


def test_of_choices_that_are_as_good_the_plainer_names_are_taken():
    found, whole = ends(4.9, 5.1, 10, names=["net.1.0.2", "net.1", "net"])
    assert names(choose(found, whole, 2)) == ["net.1"]
    found, whole = ends(4.9, 6.0, 10, names=["net.1.0.2", "net.1", "net"])
    assert names(choose(found, whole, 2)) == ["net.1.0.2"]


def test_each_stage_has_parameters_that_train():
    found, whole = ends(5, 6, 10, parameters=[0, 2, 4])
    assert names(choose(found, whole, 2)) == ["m1"]
    found, whole = ends(2, 5, 10, parameters=[2, 4, 4])
    assert names(choose(found, whole, 2)) == ["m0"]
    assert choose(found, whole, 3) is None


def test_too_few_places_give_none():
    found, whole = ends(1, 2, 3)
    assert choose(found, whole, 4) is None
    assert names(choose(found, whole, 3)) == ["m0", "m1"]


# ---- real models


def check(model, run, boundaries):
    plan = trace_stages(model, boundaries, run)
    check_split(model, plan, run)
    return plan


def candidates(model, run):
    return [c.name for c in measure(model, run).candidates]


def balanced(model, run, stages):
    return balance(model, measure(model, run), stages, partial(check, model, run))


def cuts_by_trial(model, run):
    """Every module that can be cut, found by trying all."""
    found = []
    for name, _ in model.named_modules():
        with suppress(BoundaryError, StageError):
            check(model, run, [name])
            found.append(name)
    return found


class UNet(nn.Module):
    """A skip connection from `down` to `up`, around `deep`; only `stem` and `up` can be cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = block(5, 6), block(6, 6)
        self.deep, self.up = nn.Sequential(block(6, 6), block(6, 6)), nn.Bilinear(6, 6, 6)
        self.head = nn.Sequential(block(6, 6), nn.Linear(6, CLASSES))

    def forward(self, x):
        skip = self.down(self.stem(x))
        return self.head(self.up(skip, self.deep(skip)))


class Parallel(Net):
    """`b` and `c` both read `a`."""

    def forward(self, x):
        h = self.a(x)
        return self.d(self.b(h) + self.c(h))


class Tied(Net):
    """`a` and `c` have one weight."""

    def __init__(self):
        super().__init__(a=nn.Linear(6, 6), c=nn.Linear(6, 6))
        self.c.weight = self.a.weight

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1)))


class Twice(Net):
    def forward(self, x):
        return self.d(self.c(self.b(self.b(self.a(x)))))


MODELS = {
    "mlp": (mlp, vectors, classify),
    "resnet": (lambda: ResNet(1, num_classes=CLASSES, width=4), images, classify),
    "gpt": (lambda: GPT(11, 7, 8, heads=2, layers=2), tokens, next_token),
    "unet": (UNet, vectors, classify),
    "parallel": (Parallel, vectors, classify),
    "tied": (Tied, vectors, classify),
    "twice": (Twice, vectors, classify),
}


def model_and_run(kind):
    make, batch, step = MODELS[kind]
    model, batch = make(), batch()
    return model, lambda: step(model, batch)


@pytest.mark.parametrize("kind", MODELS)
def test_candidates_are_the_modules_that_can_be_cut(kind):
    """Found by one pass, against trying every module; of two that end at one place, the outer one."""
    model, run = model_and_run(kind)
    found, possible = candidates(model, run), cuts_by_trial(model, run)
    assert set(found) <= set(possible)
    inner = {n for n in possible if n not in found}
    assert all(any(n.startswith(f"{outer}.") for outer in found) for n in inner), inner


def test_candidates_come_in_forward_order_with_times_and_parameters_that_grow():
    model, run = model_and_run("mlp")
    measured = measure(model, run)
    assert [c.name for c in measured.candidates] == ["0.0", "0", "1.0", "1", "2.0", "2", "3"]
    times = [0.0, *(c.time for c in measured.candidates), measured.time]
    assert times == sorted(times)
    assert [c.parameters for c in measured.candidates] == [36, 36, 78, 78, 120, 120, 141]
    assert measured.parameters == 141


def test_only_the_ends_of_residual_blocks_can_be_cut():
    model, run = model_and_run("gpt")
    assert candidates(model, run) == ["embedding.token", "embedding", "block_0", "block_1", "head.0", "head"]
    model, run = model_and_run("unet")
    assert candidates(model, run) == ["stem.0", "stem", "down.0", "down", "up", "head.0.0", "head.0", "head"]


@pytest.mark.parametrize("kind", ["mlp", "resnet", "gpt", "unet"])
@pytest.mark.parametrize("stages", [2, 3])
def test_what_is_chosen_can_be_cut(kind, stages):
    model, run = model_and_run(kind)
    found = balanced(model, run, stages)
    assert len(found.boundaries) == stages - 1
    check(model, run, found.boundaries)
    assert sum(found.parameters) == sum(p.numel() for p in model.parameters())
    assert min(found.parameters) > 0
    assert sum(found.shares) == pytest.approx(1.0)


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.03)
        return super().forward(x)


def test_a_slow_module_is_alone():
    model = nn.Sequential(block(5, 6), block(6, 6), Slow(6, 6), block(6, 6), nn.Linear(6, CLASSES))
    batch = vectors()
    found = balanced(model, lambda: classify(model, batch), 3)
    assert found.boundaries[1] == "2"
    assert found.boundaries[0] in ("1", "0")
    assert found.shares[1] > 0.8


def test_measuring_leaves_random_numbers_buffers_and_calls_as_they_were():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    batch, state = vectors(), torch.get_rng_state()
    before = {n: b.clone() for n, b in model.named_buffers()}
    measure(model, lambda: classify(model, batch))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all("_compiled_call_impl" not in vars(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_only_the_split_itself_finds_is_left_out():
    """What is run again inside of a checkpoint cannot be cut, which a graph does not show."""

    class Checkpoints(Net):
        def forward(self, x):
            together = lambda h: self.c(self.b(h))
            return self.d(checkpoint(together, self.a(x), use_reentrant=False))

    model, batch = Checkpoints(b=Slow(6, 6)), vectors()
    run = lambda: classify(model, batch)
    assert "b" in candidates(model, run)
    found = balanced(model, run, 2)
    assert found.boundaries[0] not in ("b", "b.0", "b.1")


def test_too_few_places_are_named_with_their_number():
    model, run = model_and_run("tied")
    says = r"to find 4 places where Tied can be cut.*5 stages.*got 1: \['c'\].*Use fewer processes"
    with pytest.raises(BoundaryError, match=says):
        balanced(model, run, 5)


def test_a_refusal_is_given_as_the_reason():
    class Penalty(Net):
        """Another output with every run, which only the self-check sees."""

        runs = itertools.count(1)

        def forward(self, x):
            return super().forward(x) * next(self.runs)

    model, batch = Penalty(), vectors()
    says = r"to find 1 places .*got 0: \[\]\. The last other one was refused: .*differs by"
    with pytest.raises(BoundaryError, match=says):
        balanced(model, lambda: classify(model, batch), 2)


def test_a_step_without_a_loss_is_refused():
    model, batch = mlp(), vectors()
    with pytest.raises(BoundaryError, match=r"return a loss that can be differentiated.*got NoneType"):
        measure(model, lambda: [model(batch[0]), None][1])


def test_the_table_says_what_was_chosen():
    text = Balance(("net.block_1", "net.3"), (0.5, 0.25, 0.25), (1234, 5, 67)).text()
    assert "['net.block_1', 'net.3'], by measured forward time alone" in text
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["0", "net.block_1", "50.0%", "1,234"],
        ["1", "net.3", "25.0%", "5"],
        ["2", "(the", "loss)", "25.0%", "67"],
    ]


def test_nothing_is_tried_twice():
    found, whole = ends(1, 2, 3)
    measured = Measured(tuple(found), whole.time, whole.parameters)
    asked = []

    def refuse(boundaries):
        asked.append(list(boundaries))
        raise BoundaryError("no")

    with pytest.raises(BoundaryError, match=r"got 0: \[\]\. The last other one was refused: no"):
        balance(mlp(), measured, 2, refuse)
    assert sorted(asked) == [["m0"], ["m1"]]
