"""What cannot be cut correctly is refused by name, on whatever step it appears; what can is not."""

import copy

import pytest
import torch
from core.nets import CLASSES, LAMBDAS, Told, assert_close, attached, blobs, grads, mlp, run_step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dni.core import GradientEstimator, Signal
from lightning_dni.errors import BoundaryError, EstimatorError, StageError
from lightning_dni.estimators import CriticEstimator


class Stem(nn.Module):
    """Keeps what is inside it, as a module that penalizes its activations would."""

    def __init__(self, additions):
        super().__init__()
        self.inner = nn.Identity() if additions else nn.Linear(5, 5)
        self.shift = nn.Parameter(torch.randn(5))
        self.additions, self.kept = additions, None

    def forward(self, x):
        self.kept = self.inner(x) + self.shift
        return self.kept + self.shift if self.additions else self.kept.tanh()


class Net(nn.Module):
    """a -> b -> c, cut after a and b, with something `wrong` once `right_steps` have gone well."""

    def __init__(self, wrong="right", right_steps=0, additions=False):
        super().__init__()
        self.a, self.b = Stem(additions), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.c, self.aux = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
        self.wrong, self.right_steps = wrong, right_steps
        self.double()

    def forward(self, x):
        self.right_steps -= 1
        return getattr(self, self.wrong if self.right_steps < 0 else "right")(x)

    def right(self, x):
        return self.c(self.b(self.a(x)))

    def skip_past_a(self, x):
        h = self.a(x)
        return self.c(self.b(h + self.a.kept))

    def auxiliary_head(self, x):
        return self.right(x) + self.aux(self.a.kept)

    def penalty(self, x):
        return self.right(x) + self.a.kept.square().mean()

    def skip_past_b(self, x):
        h = self.a(x)
        return self.c(self.b(h) + h)

    def skip_past_b_by_a_copy(self, x):
        h = self.a(x)
        kept, z = h * 2, self.b(h)
        del h
        return self.c(z + kept)

    def not_run(self, x):
        return self.c(self.b[1](self.b[0](self.a(x))))

    def in_place(self, x):
        return self.c(self.b(self.a(x).mul_(2)))

    def in_place_view(self, x):
        h = self.a(x)
        h[:, 0] = 0
        return self.c(self.b(h))

    def by_its_forward(self, x):
        return self.c(self.b.forward(self.a(x)))


INSIDE_A = r"leaks around boundary 'a'.*inside the stage that 'a' has closed.*Choose as boundary"
PAST_B = r"leaks around boundary 'b': the output of boundary 'a' goes into it and past it, to the loss"
NOT_RUN = r"every boundary to run in the forward pass.*\['b'\] did not \(ran: \['a'\]\)"
IN_PLACE = r"not to be changed in place.*Choose as boundary the module that makes the change"
WRONGS = {
    "skip_past_a": INSIDE_A,
    "auxiliary_head": INSIDE_A,
    "penalty": INSIDE_A,
    "skip_past_b": PAST_B,
    "skip_past_b_by_a_copy": PAST_B,
    "not_run": NOT_RUN,
    "by_its_forward": NOT_RUN,
    "in_place": IN_PLACE,
    "in_place_view": IN_PLACE,
}


@pytest.mark.parametrize("right_steps", [0, 2])
@pytest.mark.parametrize("probe", [False, True], ids=["", "probe"])
@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("wrong", WRONGS)
def test_a_way_around_a_cut_is_refused(wrong, bp_lambda, probe, right_steps):
    model, batch = Net(wrong, right_steps), blobs()
    engine = attached(model, ["a", "b"], bp_lambda=bp_lambda)
    for _ in range(right_steps):
        run_step(engine, model, batch)
    if probe:
        engine.request_probe()
    with pytest.raises(BoundaryError, match=WRONGS[wrong]):
        run_step(engine, model, batch)


@pytest.mark.parametrize("probe", [False, True], ids=["", "probe"])
@pytest.mark.parametrize("bp_lambda", LAMBDAS)
@pytest.mark.parametrize("wrong", ["skip_past_a", "auxiliary_head", "penalty"])
def test_a_stage_of_plain_additions_is_refused_too(wrong, bp_lambda, probe):
    """Its graph saves nothing, so torch differentiates it twice without a word."""
    model, batch = Net(wrong, additions=True), blobs()
    engine = attached(model, ["a", "b"], bp_lambda=bp_lambda)
    if probe:
        engine.request_probe()
    with pytest.raises(BoundaryError, match=INSIDE_A):
        run_step(engine, model, batch)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_graph_kept_from_an_earlier_step_is_refused(bp_lambda):
    model, batch = Net(), blobs()
    engine = attached(model, ["a", "b"], bp_lambda=bp_lambda)
    run_step(engine, model, batch)
    kept = model.a.kept
    with pytest.raises(BoundaryError, match=r"leaks around boundary 'a'.*kept from an earlier step"):
        run_step(engine, model, batch, lambda out, y: F.cross_entropy(out, y) + kept.mean())


def test_a_refused_step_leaves_the_next_one_clean():
    model, batch = Net(), blobs()
    twin = copy.deepcopy(model)
    engine = attached(model, ["a", "b"])
    model.wrong = "auxiliary_head"
    with pytest.raises(BoundaryError, match="leaks"):
        run_step(engine, model, batch)
    model.wrong = "right"
    run_step(engine, model, batch)
    run_step(attached(twin, ["a", "b"]), twin, batch)
    assert_close(grads(model), grads(twin), atol=0)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.layer, self.use_reentrant = nn.Linear(5, 5).double(), use_reentrant

    def forward(self, x):
        run = lambda x: self.layer(x).tanh()
        return checkpoint(run, x.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_reentrant_checkpoint_is_refused(bp_lambda):
    model, batch = nn.Sequential(Checkpointed(True), nn.Linear(5, CLASSES).double()), blobs()
    with pytest.raises(StageError, match="use_reentrant=False below boundary '0'"):
        run_step(attached(model, ["0"], bp_lambda=bp_lambda), model, batch)


def test_a_reentrant_checkpoint_above_the_last_cut_is_refused():
    model = nn.Sequential(nn.Linear(5, 5).double(), Checkpointed(True))
    model[1].forward = lambda x: checkpoint(model[1].layer, x, use_reentrant=True)
    with pytest.raises(StageError, match="use_reentrant=False below the loss"):
        run_step(attached(model, ["0"]), model, blobs(), lambda out, y: out.square().mean())


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_checkpoint_that_is_not_reentrant_is_legal(bp_lambda):
    model, batch = nn.Sequential(Checkpointed(False), nn.Linear(5, CLASSES).double()), blobs()
    plain = nn.Sequential(nn.Sequential(copy.deepcopy(model[0].layer), nn.Tanh()), copy.deepcopy(model[1]))
    for net in (model, plain):
        engine = attached(net, ["0"], bp_lambda=bp_lambda)
        engine.request_probe()
        run_step(engine, net, batch)
    assert torch.equal(model[0].layer.weight.grad, plain[0][0].weight.grad)


class Complex(nn.Module):
    def forward(self, x):
        return torch.complex(x, x)


def test_complex_activations_are_refused():
    model = nn.Sequential(nn.Linear(5, 5).double(), Complex())
    with pytest.raises(BoundaryError, match=r"real activations at boundary '1', but got torch\.complex128"):
        run_step(attached(model, ["1"]), model, blobs(), lambda out, y: out.abs().sum())


class Bad(GradientEstimator):
    def __init__(self, spec, give):
        super().__init__()
        self.give = give

    def synthesize(self, h, context, state):
        return self.give(h[0]), None


@pytest.mark.parametrize(
    ("give", "match"),
    [
        (
            lambda h: (h[:, :-1],),
            r"Bad at boundary '0' to give one gradient per.*\(8, 6\).*\(8, 5\)",
        ),
        (lambda h: (h.sum(),), "one gradient per activation"),
        (lambda h: (h, h), "one gradient per activation"),
        (lambda h: (), "one gradient per activation"),
        (lambda h: (h * float("nan"),), "Bad at boundary '0' to give finite gradients.*learning rate"),
        (lambda h: (h / 0.0,), "finite gradients"),
    ],
)
@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_bad_synthetic_gradient_is_refused(give, match, bp_lambda):
    model = mlp()
    engine = attached(model, ["0"], lambda spec: Bad(spec, give), bp_lambda=bp_lambda)
    with pytest.raises(EstimatorError, match=match):
        run_step(engine, model, blobs())


class Greedy(Told):
    needs = frozenset({Signal.TRUE_GRADIENT, Signal.TARGET})


def test_a_signal_that_is_not_supplied_is_refused():
    with pytest.raises(EstimatorError, match=r"Greedy at boundary '0' to need only.*\['true gradient'\]"):
        run_step(attached(model := mlp(), ["0"], Greedy), model, blobs())


def test_what_is_no_estimator_is_refused():
    with pytest.raises((EstimatorError, TypeError), match="GradientEstimator"):
        run_step(attached(model := mlp(), ["0"], lambda spec: nn.Linear(1, 1)), model, blobs())


def test_a_critic_that_saw_no_output_is_refused():
    model, (x, y) = mlp(), blobs()
    engine = attached(model, ["0", "1"], lambda spec: CriticEstimator(spec, CLASSES))
    with engine.training_step((x, y)):
        loss = F.cross_entropy(model[2](model[1](model[0](x))), y)
    with pytest.raises(EstimatorError, match=r"network's output for CriticEstimator at boundary.*`output=`"):
        engine.backward(loss)


# ---- legal


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_weight_penalty_adds_up(bp_lambda):
    model, batch = mlp(), blobs()
    twin = copy.deepcopy(model)
    penalty = lambda net: sum(p.square().sum() for p in net.parameters())
    run_step(
        attached(model, ["0", "1"], bp_lambda=bp_lambda),
        model,
        batch,
        lambda out, y: F.cross_entropy(out, y) + penalty(model),
    )
    run_step(attached(twin, ["0", "1"], bp_lambda=bp_lambda), twin, batch)
    penalty(twin).backward()
    assert_close(grads(model), grads(twin), atol=1e-14)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(CLASSES, 5).double(), nn.Linear(5, 5).double()

    def forward(self, ids):
        return self.middle(self.embedding(ids)) @ self.embedding.weight.T


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_tied_weights_add_up(bp_lambda):
    model, ids = Tied(), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1])
    twin = copy.deepcopy(model)
    run_step(attached(model, ["embedding"], bp_lambda=bp_lambda), model, (ids, ids))
    h = twin.embedding(ids)
    leaf = h.detach().requires_grad_()
    F.cross_entropy(twin.middle(leaf) @ twin.embedding.weight.T, ids).backward()
    h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(grads(model), grads(twin), atol=1e-14)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_penalty_on_the_topmost_boundary_tensor_is_part_of_its_target(bp_lambda):
    model, (x, y) = mlp(), blobs()
    twin, seen = copy.deepcopy(model), []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    engine = attached(model, ["1"], bp_lambda=bp_lambda)
    run_step(engine, model, (x, y), lambda out, y: F.cross_entropy(out, y) + seen[0].square().sum())
    h = twin[:2](x)
    leaf = h.detach().requires_grad_()
    (F.cross_entropy(twin[2](leaf), y) + leaf.square().sum()).backward()
    h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(grads(model), grads(twin), atol=1e-13)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_a_look_at_a_closed_stage_that_is_not_in_the_loss_is_legal(bp_lambda):
    model, batch = Net(), blobs()
    engine = attached(model, ["a", "b"], bp_lambda=bp_lambda)
    with engine.training_step(batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        assert model.aux(model.a.kept.detach()).isfinite().all()
        assert model.a.kept.norm().item() > 0
    engine.backward(loss)


def test_anomaly_detection_may_be_on():
    model, batch = mlp(), blobs()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        run_step(attached(model, ["0", "1"], bp_lambda=0.5), model, batch)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Custom(nn.Module):
    def forward(self, x):
        return Double.apply(x)


@pytest.mark.parametrize("bp_lambda", LAMBDAS)
def test_custom_functions_are_stages_like_others(bp_lambda):
    model, batch = nn.Sequential(nn.Linear(5, 6).double(), Custom(), nn.Linear(6, CLASSES).double()), blobs()
    twin = nn.Sequential(model[0], nn.Identity(), model[2])
    run_step(attached(model, ["1"], bp_lambda=bp_lambda), model, batch)
    ours = grads(model)
    model.zero_grad()
    h = twin[0](batch[0]) * 2
    leaf = h.detach().requires_grad_()
    F.cross_entropy(twin[2](leaf), batch[1]).backward()
    h.backward((1 - bp_lambda) * h.detach().sin() / 8 + bp_lambda * leaf.grad)
    assert_close(ours, grads(model), atol=1e-14)
