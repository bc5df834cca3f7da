"""What torch puts into a stage or across a boundary: equal to a twin in plain autograd, or refused."""

import copy
from functools import partial

import pytest
import torch
from core.nets import Told, assert_close, attached, grads, run_step, same_bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lightning_dni.errors import BoundaryError, StageError

ROWS, POSITIONS = 4, 3
ALL_LAMBDAS = pytest.mark.parametrize("bp_lambda", [0.0, 0.5, 1.0])


def rule(h):
    """A synthetic gradient that is not the same when its steps are rounded."""
    return h.sin() * 1.1 - 0.3


TOLD = partial(Told, rule=rule)


def by_hand(stages, x, loss_of, bp_lambda):
    """Every stage on detached copies of what the one below gave, whatever the structure of that."""
    values, outputs = [x], []
    for stage in stages[:-1]:
        out = stage(values[-1])
        outputs.append(out)
        cut = [
            None if t is None else t.detach().requires_grad_(t.requires_grad) for t in pytree.tree_leaves(out)
        ]
        values.append(pytree.tree_unflatten(cut, pytree.tree_structure(out)))
    loss_of(stages[-1](values[-1]), None).backward()
    for out, above in zip(reversed(outputs), reversed(values[1:]), strict=True):
        hs, incoming = ([t for t in pytree.tree_leaves(v) if t is not None] for v in (out, above))
        incoming = [t.grad for t in incoming]
        mixed = []
        for h, g in zip(hs, incoming, strict=True):
            rows = max(1, len(h))
            synthetic = (rule(h.detach().to(torch.promote_types(h.dtype, torch.float32))) / rows).to(h.dtype)
            back = torch.zeros_like(h) if g is None else g
            mixed.append((1 - bp_lambda) * synthetic + bp_lambda * back)
        if any(g is not None for g in incoming) or bp_lambda < 1:
            torch.autograd.backward(hs, mixed)


def energy(value, _):
    """A loss of everything that came out."""
    return sum(t.float().cos().sum() if torch.is_tensor(t) else 0 for t in pytree.tree_leaves(value)) / ROWS


def check(model, x, bp_lambda, atol=1e-14):
    """The engine, cut after every child of `model`, against the twin; the attached engine is returned."""
    twin = copy.deepcopy(model)
    names = [name for name, _ in model.named_children()]
    engine = attached(model, names[:-1], TOLD, bp_lambda=bp_lambda)
    for _ in range(2):
        torch.manual_seed(1)
        run_step(engine, model, (x, None), energy)
        torch.manual_seed(1)
        by_hand(list(twin.children()), x, energy, bp_lambda)
    densified = [{n: None if g is None else g.to_dense() for n, g in grads(m).items()} for m in (model, twin)]
    assert_close(*densified, atol=atol)
    assert same_bits(dict(model.named_buffers()), dict(twin.named_buffers()))
    return engine


class Apply(nn.Module):
    """`function(module(x))`, or with a checkpoint around it."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x):
        return self.function(self.module(x))


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant=False):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class Positive(nn.Module):
    def forward(self, weight):
        return nn.functional.softplus(weight)


class Recurrent(nn.Module):
    """A recurrent layer that takes up and hands on (outputs, hidden state)."""

    def __init__(self, kind, features):
        super().__init__()
        self.rnn = kind(features, 5, batch_first=True)

    def forward(self, value):
        return self.rnn(*value) if isinstance(value, tuple) else self.rnn(value)


class BatchFirstRecurrent(Recurrent):
    """The same, whose hidden state counts rows in dimension 0, as a boundary's leaves do."""

    def forward(self, value):
        if isinstance(value, tuple):
            value = value[0], pytree.tree_map(lambda h: h.transpose(0, 1).contiguous(), value[1])
        out, state = super().forward(value)
        return out, pytree.tree_map(lambda h: h.transpose(0, 1), state)


class Attention(nn.Module):
    """Self-attention that hands on its weights too, where asked for."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, value):
        h = value[0] if isinstance(value, tuple) else value
        return self.attention(h, h, h, need_weights=self.need_weights)


class Spectrum(nn.Module):
    """Filters in the frequency domain: complex numbers inside, real outside."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)


class Rows(nn.Module):
    """One learned row, expanded over the batch: every row of the output is the same memory."""

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.row.expand(len(x), -1)


def linear(features=6, out=6):
    return nn.Linear(features, out)


def three(middle):
    """A layer, what is to be tested, and two layers that it is between."""
    return nn.Sequential(
        nn.Sequential(linear(), nn.Tanh()), middle(), nn.Sequential(linear(), nn.Tanh()), linear()
    )


def dropout_inside():
    return Checkpointed(nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()))


def parametrized():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Positive())
    return layer


ON_VECTORS = {
    "checkpoint": dropout_inside,
    "checkpoint of checkpoint": lambda: Checkpointed(nn.Sequential(dropout_inside(), linear())),
    "parametrize": parametrized,
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "complex inside": Spectrum,
    "in-place relu": lambda: nn.ReLU(inplace=True),
    "in-place relu inside": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), linear()),
    "identity": nn.Identity,
    "dropout 0": lambda: nn.Dropout(0.0),
    "dropout": lambda: nn.Dropout(0.3),
    "slice": lambda: Apply(linear(6, 9), lambda h: h[:, 1:7]),
    "transposed": lambda: Apply(linear(), lambda h: h.T.contiguous().T),
    "two names for one memory": lambda: Apply(linear(), lambda h: h.view(-1).view_as(h)),
}


@ALL_LAMBDAS
@pytest.mark.parametrize("kind", [k for k in ON_VECTORS if k != "in-place relu"])
def test_a_stage_of_any_layer_is_the_twins(kind, bp_lambda):
    check(three(ON_VECTORS[kind]).double(), torch.randn(ROWS, 6).double(), bp_lambda)


@ALL_LAMBDAS
def test_an_in_place_relu_is_a_boundary(bp_lambda):
    model, x = three(nn.Tanh).double(), torch.randn(ROWS, 6).double()
    twin = copy.deepcopy(model)
    model[0][1], twin[0][1] = nn.ReLU(inplace=True), nn.ReLU()
    engine = attached(model, ["0.1", "2"], TOLD, bp_lambda=bp_lambda)
    run_step(engine, model, (x, None), energy)
    by_hand([twin[0], twin[1:3], twin[3]], x, energy, bp_lambda)
    assert_close(grads(model), grads(twin), atol=1e-14)


@ALL_LAMBDAS
def test_an_in_place_relu_above_a_boundary_is_refused(bp_lambda):
    model = three(ON_VECTORS["in-place relu"])
    engine = attached(model, ["0", "1"], TOLD, bp_lambda=bp_lambda)
    with pytest.raises(BoundaryError, match=r"\['0'\] not to be changed in place.*inplace=True activation"):
        run_step(engine, model, (torch.randn(ROWS, 6), None), energy)


@ALL_LAMBDAS
def test_a_reentrant_checkpoint_is_refused(bp_lambda):
    model = three(lambda: Checkpointed(linear(), use_reentrant=True))
    engine = attached(model, ["0", "1"], TOLD, bp_lambda=bp_lambda)
    with pytest.raises(StageError, match=r"use_reentrant=False below boundary '1'"):
        run_step(engine, model, (torch.randn(ROWS, 6), None), energy)


class TwoStages(nn.Module):
    """Two layers and what was left of them after a checkpoint around both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = dropout_inside().module, dropout_inside().module
        self.checkpointed = True

    def forward(self, x):
        both = lambda x: self.b(self.a(x))
        return checkpoint(both, x, use_reentrant=False) if self.checkpointed else both(x)


@ALL_LAMBDAS
def test_a_boundary_inside_a_checkpoint_is_the_twins(bp_lambda):
    """The cut is made once, whatever is run again for its activations."""
    model, x = nn.Sequential(TwoStages(), linear()).double(), torch.randn(ROWS, 6).double()
    twin = copy.deepcopy(model)
    asked = []

    class Counting(Told):
        def __init__(self, spec):
            super().__init__(spec, lambda h: asked.append(spec.name) or rule(h))

    engine = attached(model, ["0.a", "0.b"], Counting, bp_lambda=bp_lambda)
    torch.manual_seed(1)
    run_step(engine, model, (x, None), energy)
    torch.manual_seed(1)
    by_hand([twin[0].a, twin[0].b, twin[1]], x, energy, bp_lambda)
    assert_close(grads(model), grads(twin), atol=1e-14)
    assert asked == ["0.a", "0.b"]


@ALL_LAMBDAS
def test_a_cached_parametrization_in_two_forwards_is_refused(bp_lambda):
    model, x = three(parametrized), torch.randn(ROWS, 6)
    engine = attached(model, ["0", "1"], TOLD, bp_lambda=bp_lambda)
    with (
        pytest.raises(BoundaryError, match="leaks around boundary '1'"),
        parametrize.cached(),
        engine.training_step((x, None)),
    ):
        model(x), model(x)


@ALL_LAMBDAS
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_states_cross(kind, bp_lambda):
    layers = [BatchFirstRecurrent(kind, features) for features in (6, 5, 5)]
    check(nn.Sequential(*layers).double(), torch.randn(ROWS, POSITIONS, 6).double(), bp_lambda)


@ALL_LAMBDAS
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=str)
def test_transformer_layers_are_the_twins(options, bp_lambda):
    layers = [nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True, **options) for _ in range(3)]
    check(nn.Sequential(*layers).double(), torch.randn(ROWS, POSITIONS, 6).double(), bp_lambda)


@ALL_LAMBDAS
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_weights_cross(need_weights, bp_lambda):
    layers = [Attention(need_weights) for _ in range(3)]
    check(nn.Sequential(*layers).double(), torch.randn(ROWS, POSITIONS, 6).double(), bp_lambda)


@ALL_LAMBDAS
def test_sparse_gradients_are_the_twins_and_stay_sparse(bp_lambda):
    embedding = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(0, 1))
    model = nn.Sequential(embedding, nn.Sequential(linear(), nn.Tanh()), linear()).double()
    check(model, torch.randint(9, (2, ROWS)), bp_lambda)
    assert embedding[0].weight.grad.is_sparse


@ALL_LAMBDAS
def test_complex_activations_that_cross_are_refused(bp_lambda):
    model = three(lambda: Apply(linear(), torch.fft.rfft))
    engine = attached(model, ["0", "1"], TOLD, bp_lambda=bp_lambda)
    with pytest.raises(
        BoundaryError, match=r"Expected real activations at boundary '1', but got torch\.complex64"
    ):
        run_step(engine, model, (torch.randn(ROWS, 6), None), energy)


@ALL_LAMBDAS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_the_twins_to_the_bit(dtype, bp_lambda):
    """The synthetic gradient is made in float32 and rounded once."""
    check(three(linear).to(dtype), torch.randn(ROWS, 6, dtype=dtype), bp_lambda, atol=0)


@ALL_LAMBDAS
def test_precisions_may_change_at_a_boundary(bp_lambda):
    down, up = Apply(linear(), lambda h: h.bfloat16()), Apply(nn.Identity(), lambda h: h.float().tanh())
    check(nn.Sequential(down, up, linear(), linear()), torch.randn(ROWS, 6), bp_lambda, atol=0)


@ALL_LAMBDAS
def test_channels_last_stays(bp_lambda):
    layers = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*layers).double().to(memory_format=torch.channels_last)
    seen = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(ROWS, 3, 5, 5).double().to(memory_format=torch.channels_last)
    check(model, x, bp_lambda)
    assert len(seen) == 4  # two steps, here and in the twin
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)


@ALL_LAMBDAS
def test_an_expanded_row_is_the_twins(bp_lambda):
    check(
        nn.Sequential(Rows(), nn.Sequential(linear(), nn.Tanh()), linear()).double(),
        torch.zeros(ROWS, 1),
        bp_lambda,
    )


@ALL_LAMBDAS
def test_views_of_one_tensor_may_cross_together(bp_lambda):
    def both(parts):
        return torch.cat(parts, 1).tanh()

    def split(h):
        return tuple(h.split([2, 4], 1))

    split_layer, joined = Apply(linear(), split), nn.Sequential(Apply(nn.Identity(), both), linear())
    check(nn.Sequential(split_layer, joined, linear()).double(), torch.randn(ROWS, 6).double(), bp_lambda)


@ALL_LAMBDAS
@pytest.mark.parametrize("module", [nn.Identity, partial(nn.Dropout, 0.0)], ids=["identity", "dropout 0"])
def test_what_returns_its_input_may_be_a_boundary_several_times(module, bp_lambda):
    model = nn.Sequential(linear(), module(), module(), linear()).double()
    check(model, torch.randn(ROWS, 6).double(), bp_lambda)


@ALL_LAMBDAS
def test_a_boundary_that_passes_the_input_on_cuts_nothing(bp_lambda):
    model, x = nn.Sequential(nn.Identity(), linear()).double(), torch.randn(ROWS, 6).double()
    engine = attached(model, ["0"], TOLD, bp_lambda=bp_lambda)
    run_step(engine, model, (x, None), energy)
    twin = copy.deepcopy(model)
    energy(twin(x), None).backward()
    assert same_bits(grads(model), grads(twin))


@ALL_LAMBDAS
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("kind", ["checkpoint", "spectral norm", "dropout 0", "slice"])
def test_batches_of_no_row_and_of_one_are_the_twins(kind, rows, bp_lambda):
    check(three(ON_VECTORS[kind]).double(), torch.randn(rows, 6).double(), bp_lambda)
