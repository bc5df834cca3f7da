"""Streams of our own: the global generator is where it would have been without us."""

import copy

import pytest
import torch
from core.nets import (
    CLASSES,
    LAMBDAS,
    VECTOR_ESTIMATORS,
    attached,
    blobs,
    grads,
    mlp,
    run_step,
    same_bits,
)
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.core.randomness import RandomStream, derive_seed, seeded

CPU = torch.device("cpu")


def test_streams_differ_by_label_and_seed():
    seeds = {
        derive_seed(s, *labels) for s in range(3) for labels in ((), ("a",), ("b",), ("a", 1), ("a", "1"))
    }
    assert len(seeds) == 15
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_derived_seed_is_the_same_everywhere():
    assert derive_seed(0, "stage", None, 0, 3) == 5504584218403642667


def test_a_seeded_block_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    with seeded(3, CPU):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3, CPU):
        assert torch.equal(torch.rand(3), drawn)


def test_a_seeded_block_leaves_the_generator_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3, CPU):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_goes_on_where_it_stopped():
    stream, before = RandomStream(5, CPU), torch.get_rng_state()
    with stream:
        first = torch.rand(2)
    torch.rand(1)
    with stream:
        second = torch.rand(2)
    torch.set_rng_state(before)
    with seeded(5, CPU):
        assert torch.equal(torch.rand(4), torch.cat([first, second]))


def test_a_stream_can_be_saved():
    stream, other = RandomStream(5, CPU), RandomStream(6, CPU)
    with stream:
        torch.rand(7)
    other.load_state_dict(copy.deepcopy(stream.state_dict()))
    with stream:
        expected = torch.rand(2)
    with other:
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("kind", VECTOR_ESTIMATORS)
def test_the_global_generator_is_never_drawn_from(kind, bp_lambda):
    model, batch = mlp(dropout=0.3), blobs()
    twin = copy.deepcopy(model)
    states = []
    for net in (model, twin):
        torch.manual_seed(1)
        if net is model:
            engine = attached(net, ["0", "1"], VECTOR_ESTIMATORS[kind], bp_lambda=bp_lambda)
        for _ in range(2):
            if net is model:
                engine.request_probe()
                run_step(engine, net, batch)
                engine.update_estimators()
            else:
                F.cross_entropy(net(batch[0]), batch[1]).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_estimators_start_alike_whatever_was_drawn_before():
    starts = []
    for drawn in (0, 100):
        model = mlp()
        engine = attached(model, ["0"], VECTOR_ESTIMATORS["mlp"], seed=3)
        torch.rand(drawn)
        run_step(engine, model, blobs())
        starts.append({n: p.clone() for n, p in engine.estimators["0"].named_parameters()})
    assert same_bits(*starts)


def staged(global_seed, seed=3, steps=2):
    torch.manual_seed(0)
    model, batch = mlp((5, 6, 7, 6, CLASSES), dropout=0.5), blobs()
    torch.manual_seed(global_seed)
    before = torch.get_rng_state()
    engine = DNIEngine(model, ["0", "1", "2"], VECTOR_ESTIMATORS["linear"], rng="stage", seed=seed)
    with engine:
        for _ in range(steps):
            run_step(engine, model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    return grads(model)


def test_stage_streams_depend_on_the_engines_seed_alone():
    assert same_bits(staged(1), staged(2))
    assert not same_bits(staged(1), staged(1, seed=4))


def test_stage_streams_follow_torchs_seed_by_default():
    assert same_bits(staged(1, seed=None), staged(1, seed=None))
    assert not same_bits(staged(1, seed=None), staged(2, seed=None))


def masks(boundaries, **options):
    """What the dropout of every stage lets through in two steps of `rng="stage"`."""
    torch.manual_seed(0)
    model, seen = mlp((5, 16, 16, 16, CLASSES), dropout=0.5), []
    for stage in model[:-1]:
        stage[-1].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    engine = DNIEngine(model, boundaries, VECTOR_ESTIMATORS["zero"], rng="stage", seed=3, **options)
    with engine:
        for _ in range(2):
            run_step(engine, model, blobs())
    return seen


def test_stages_and_steps_have_masks_of_their_own():
    seen = masks(["0", "1"])
    assert len(seen) == 6
    assert all(not torch.equal(seen[i], seen[k]) for i in range(6) for k in range(i))


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_masks_do_not_depend_on_lambda(bp_lambda):
    synthetic, mixed = masks(["0", "1"]), masks(["0", "1"], bp_lambda=bp_lambda)
    assert all(torch.equal(a, b) for a, b in zip(synthetic, mixed, strict=True))


def test_repeated_calls_of_a_frozen_boundary_have_masks_of_their_own():
    model, seen = mlp((5, 16, 16, CLASSES), dropout=0.5), []
    model[0].requires_grad_(False)
    model[1][-1].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    engine = attached(model, ["0"], rng="stage")
    x, y = blobs()
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)
    engine.backward(loss)
    assert not torch.equal(*seen)


def failing_step(engine, model, batch):
    with engine.training_step(batch):
        model(batch[0])
        raise KeyError


def test_a_failing_step_puts_the_generator_back():
    model, batch = mlp(dropout=0.5), blobs()
    engine, before = attached(model, ["0"], rng="stage"), torch.get_rng_state()
    with pytest.raises(KeyError):
        failing_step(engine, model, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_validation_pass_draws_from_the_global_generator():
    model, (x, _) = mlp(dropout=0.5), blobs()
    attached(model, ["0", "1"], rng="stage")
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    ours = model(x)
    torch.manual_seed(1)
    assert torch.equal(ours, twin(x))
