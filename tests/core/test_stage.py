"""A stage is the graph between cuts; differentiating it touches nothing but what it returns."""

import pytest
import torch
from core.nets import mlp
from torch import nn

from lightning_dni.core.stage import accumulate, local_gradients, trace_stage
from lightning_dni.errors import BoundaryError

X = torch.randn(4, 5, dtype=torch.float64)


def nobody(leaf):
    return None


def names_of(stage, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return sorted(names[id(v)] for v in stage.variables)


def test_a_stage_ends_at_parameters_and_at_boundary_tensors():
    model = mlp()
    h = model[0](X).detach().requires_grad_()
    stage = trace_stage([model[1:](h)], lambda leaf: "cut" if leaf is h else None)
    assert names_of(stage, model) == ["1.0.bias", "1.0.weight", "2.bias", "2.weight"]
    assert stage.parents == ["cut"]


def test_what_is_used_twice_is_named_once():
    layer = nn.Linear(5, 5).double()
    h = X.clone().requires_grad_()
    stage = trace_stage([layer(layer(h)) + h], lambda leaf: "cut" if leaf is h else None)
    assert len(stage.variables) == 2
    assert stage.parents == ["cut"]


def test_outputs_of_one_node_are_one_stage():
    layer = nn.Linear(5, 4).double()
    stage = trace_stage(layer(X).chunk(2, 1), nobody, "boundary 'b'", "b")
    assert len(stage.variables) == 2


def test_a_leaf_is_a_stage_of_its_own():
    h = X.clone().requires_grad_()
    assert trace_stage([h], nobody).variables == [h]


def test_a_closed_stage_is_not_entered_again():
    model = mlp()
    inner = model[0][0](X)
    trace_stage([inner.tanh()], nobody, "boundary 'deep.net'", "deep.net")
    with pytest.raises(
        BoundaryError, match=r"around boundary 'deep\.net': the loss reaches .*boundary 'deep'"
    ):
        trace_stage([inner.sum()], nobody, "the loss")


def test_looking_closes_nothing():
    h = mlp()(X)
    trace_stage([h], nobody)
    trace_stage([h], nobody, "boundary 'b'", "b")
    trace_stage([h], nobody)


def test_a_deep_graph_is_walked_without_recursion():
    h = X.clone().requires_grad_()
    out = h
    for _ in range(5000):
        out = out + 1
    assert trace_stage([out], nobody, "boundary 'b'", "b").variables == [h]


def test_local_gradients_are_those_of_autograd_and_leave_grad_alone():
    model = mlp()
    variables = list(model.parameters())
    for v in variables:
        v.grad = torch.ones_like(v)
    kept = [v.grad for v in variables]
    out = model(X)
    expected = torch.autograd.grad(out, variables, out.detach().sin(), retain_graph=True)
    found = local_gradients([out], [out.detach().sin()], variables)
    assert all(torch.equal(g, e) for (_, g), e in zip(found, expected, strict=True))
    assert all(
        v.grad is k and torch.equal(k, torch.ones_like(k)) for v, k in zip(variables, kept, strict=True)
    )


def test_grad_is_restored_after_an_error():
    model = mlp()
    model[0][0].weight.grad = kept = torch.ones_like(model[0][0].weight)
    out = model(X)
    out.sum().backward(inputs=[model[2].bias])
    with pytest.raises(RuntimeError, match="second time"):
        local_gradients([out], [out.detach()], list(model.parameters()))
    assert model[0][0].weight.grad is kept


def test_variables_without_a_gradient_are_left_out():
    used, unused = X.clone().requires_grad_(), X.clone().requires_grad_()
    assert [v for v, _ in local_gradients([used.sum()], None, [used, unused])] == [used]


def test_a_users_hook_on_a_parameter_runs_once():
    layer, calls = nn.Linear(5, 2).double(), []
    layer.weight.register_hook(lambda g: calls.append(g) or g * 2)
    out = layer(X)
    (gradient,) = (
        g for v, g in local_gradients([out.sum()], None, list(layer.parameters())) if v is layer.weight
    )
    assert len(calls) == 1
    torch.testing.assert_close(gradient, 2 * X.sum(0).expand(2, 5))


def sparse(rows):
    return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (rows, 3), check_invariants=True)


@pytest.mark.parametrize("first", [None, torch.ones(4, 3), sparse(4)], ids=["none", "dense", "sparse"])
@pytest.mark.parametrize("second", [torch.ones(4, 3), sparse(4)], ids=["dense", "sparse"])
def test_gradients_of_any_layout_add_up(first, second):
    v = torch.zeros(4, 3, requires_grad=True)
    v.grad = None if first is None else first.clone()
    accumulate([(v, second.clone())])
    total = second.to_dense() + (0 if first is None else first.to_dense())
    assert torch.equal(v.grad.to_dense(), total)
