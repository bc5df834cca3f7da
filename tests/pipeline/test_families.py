"""Chained stages are the whole model, bit for bit, for every kind of model; or refused by name."""

import copy

import pytest
import torch
from core.nets import same_bits
from pipeline.chain import Chain, Whole, buffers_of, grads_of
from pipeline.families import FAMILIES

from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.tracing import trace_stages

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def made(family, rows=None):
    model, batch = family.make(), family.batch() if rows is None else family.batch(rows)
    return model, lambda m: family.step(m, batch)


def plan_of(model, family, step, **options):
    twin = copy.deepcopy(model)
    return trace_stages(twin, family.boundaries, lambda: step(twin), **options)


def assert_chain_is_whole(model, plan, step, backward=True):
    whole = Whole(model, plan.boundaries, step, backward)
    chain = Chain(model, plan, step, whole.states, backward)
    assert torch.equal(chain.loss, whole.loss)
    assert same_bits(chain.of_owners(grads_of), whole.gradients)
    assert same_bits(chain.of_owners(buffers_of), whole.buffers)
    assert chain.strays() == []
    assert not backward or any(g is not None for g in whole.gradients.values())


@every_family
def test_chained_stages_are_the_whole_model(family):
    model, step = made(family)
    plan = plan_of(model, family, step)
    assert set(plan.boundaries) == set(family.boundaries)
    assert_chain_is_whole(model, plan, step)


@every_family
def test_another_batch_size_needs_no_new_plan(family):
    model, step = made(family)
    plan = plan_of(model, family, step)
    _, other = made(family, rows=5)
    assert_chain_is_whole(model, plan, other)


@every_family
def test_a_plan_of_training_serves_evaluation(family):
    model, step = made(family)
    plan = plan_of(model, family, step)
    model.eval()
    with torch.no_grad():
        assert_chain_is_whole(model, plan, step, backward=False)


@every_family
def test_a_plan_of_evaluation_needs_no_gradients(family):
    model, step = made(family)
    model.eval()
    plan = plan_of(model, family, step, grad=False)
    assert not any(leaf.requires_grad for c in plan.crossing.values() for leaf in c.leaves)
    with torch.no_grad():
        assert_chain_is_whole(model, plan, step, backward=False)


@every_family
def test_every_stage_owns_something_and_all_is_owned(family):
    model, step = made(family)
    plan = plan_of(model, family, step)
    assert plan.tensors.keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert {plan.owner(n) for n, _ in model.named_parameters()} == set(range(plan.stages))


@every_family
def test_the_self_check_agrees_and_changes_nothing(family):
    model, step = made(family)
    plan = plan_of(model, family, step)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads, buffers, generator = grads_of(model), buffers_of(model), torch.get_rng_state()
    check_split(model, plan, lambda: step(model))
    assert same_bits(grads_of(model), {n: torch.ones_like(g) for n, g in grads.items()})
    assert same_bits(buffers_of(model), buffers)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_chain_is_whole(model, plan, step)
