"""What one traced step says about the stages, and what it refuses by name."""

import copy

import pytest
import torch
from core.nets import same_bits
from pipeline.chain import buffers_of
from pipeline.families import FAMILIES, Dictionary, Recurrent, cnn, gpt, images, mlp, sequences
from pipeline.nets import CLASSES, Net, block, classify, traced, vectors
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.selfcheck import check_split
from lightning_dni.pipeline.tracing import trace_stages


class Given(Net):
    """Its forward is given."""

    def __init__(self, forward, **parts):
        super().__init__(**parts)
        self.given = forward

    def forward(self, x):
        return self.given(self, x)


def test_boundaries_come_out_in_the_order_in_which_they_ran():
    net = Given(lambda m, x: m.d(m.b(m.c(m.a(x)))))
    plan, _ = traced(net, ["b", "a", "c"])
    assert plan.boundaries == ("a", "c", "b")
    assert plan.owner("c.0.weight") == 1
    assert plan.stages == 4


def test_patterns_name_boundaries():
    plan, _ = traced(mlp(), ["[0-2]"])
    assert plan.boundaries == ("0", "1", "2")


def test_what_is_skipped_are_the_largest_modules_of_other_stages():
    plan, _ = traced(mlp(), ["0", "2"])
    assert [plan.skipped(k) for k in range(3)] == [["1", "2", "3"], ["0", "3"], ["0", "1", "2"]]


def test_what_crossed_is_described_and_goes_there_and_back():
    plan, _ = traced(Recurrent(), ["lower"], batch=sequences())
    crossing = plan.crossing["lower"]
    assert [leaf.shape for leaf in crossing.leaves] == [(3, 7, 6), (1, 3, 6), (1, 3, 6)]
    assert all(leaf.requires_grad and leaf.dtype == torch.float32 for leaf in crossing.leaves)
    value = (torch.ones(3, 7, 6), (torch.zeros(1, 3, 6), torch.ones(1, 3, 6)))
    again = crossing.unpack(crossing.pack(value))
    assert torch.equal(again[0], value[0])
    assert torch.equal(again[1][0], value[1][0])
    with pytest.raises(BoundaryError, match=r"3 tensors at boundary 'lower', but got 1\. Pass on"):
        crossing.unpack([value[0]])


def test_only_tensors_cross():
    net = FAMILIES["dictionary"].make()
    plan, _ = traced(net, ["b"], FAMILIES["dictionary"].step)
    crossing, value = plan.crossing["b"], Dictionary()(torch.ones(2, 6))
    assert len(crossing.pack(value)) == 3
    for other in ({**value, "name": "c"}, {**value, "rest": []}, {**value, "h": 1}):
        with pytest.raises(BoundaryError, match=r"boundary 'b' to be built as when.*Only tensors cross"):
            crossing.pack(other)


def test_the_elements_of_an_output_are_counted_per_row():
    plan, _ = traced(mlp(), ["0"])
    assert plan.elements_per_row == CLASSES
    plan, _ = traced(mlp(), ["0"], output="2.0")
    assert plan.elements_per_row == 6


def test_only_values_count_as_a_use():
    def step(model, batch):
        size = sum(p.numel() for p in model.parameters())
        x = batch[0].to(next(model.parameters()).device, model[0][0].weight.dtype)
        return classify(model, (x, batch[1])) * (size / size) * model[0][0].weight.shape[0]

    plan, _ = traced(mlp(), ["0"], step)
    assert plan.owner("0.0.weight") == 0


def test_a_constant_buffer_may_be_used_everywhere():
    plan, _ = traced(FAMILIES["positions"].make(), ["a", "b", "c"])
    assert plan.shared == {"scale"}
    assert [plan.holds(k, "scale") for k in range(4)] == [True] * 4
    assert [plan.holds(k, "average") for k in range(4)] == [False, True, False, False]


def test_a_buffer_that_changes_belongs_to_one_stage():
    def forward(m, x):
        h = m.b(m.a(x) - m.mean)
        m.mean.add_(1)
        return m.d(h)

    net = Given(forward)
    net.register_buffer("mean", torch.zeros(6))
    with pytest.raises(StageError, match=r"'mean' is used in stages \[1, 2\] of boundaries \['a', 'b'\]"):
        traced(net, ["a", "b"])


def test_unused_tensors_go_to_the_last_stage_or_to_that_of_their_module():
    net = cnn()
    net.eval()
    net.spare = nn.Linear(2, 2)
    plan, _ = traced(net, ["a", "b"], batch=images())
    assert plan.owner("a.1.num_batches_tracked") == 0
    assert plan.owner("b.1.num_batches_tracked") == 1
    assert plan.owner("spare.weight") == 2
    encoder = FAMILIES["encoder"].make()
    plan, _ = traced(encoder, ["encoder.layers.0"], batch=sequences())
    assert plan.owner("encoder.layers.0.self_attn.out_proj.bias") == 0


def tied_gpt():
    model = gpt()
    model.head[1].weight = model.embedding.token.weight
    return model


def test_tied_weights_across_stages_are_refused():
    family = FAMILIES["gpt-2"]
    says = r"'embedding.token.weight' and 'head.1.weight' is used in stages \[0, 1\].*tied.*one stage"
    with pytest.raises(StageError, match=says):
        traced(tied_gpt(), ["block_1"], family.step, family.batch())


def test_tied_weights_in_one_stage_are_owned_under_both_names():
    net = Given(lambda m, x: m.d(F.linear(m.c(m.b(m.a(x))), m.c[0].weight)))
    net.b[0].weight = net.c[0].weight
    plan, _ = traced(net, ["a"])
    assert plan.owner("b.0.weight") == plan.owner("c.0.weight") == 1


@pytest.mark.parametrize(
    ("boundaries", "says"),
    [
        (["a", "spare"], r"run in the traced step, but \['spare'\] did not; these ran.*\['a'\]\. Choose"),
        (["b"], r"run once in a forward pass of the pipeline, but got a second run of 'b'\. Choose"),
        (["nothing"], r"name submodules of Given, but got 'nothing'"),
        (["a", "same"], r"'a' and 'same' are the same module object"),
        (["odd"], r"output of boundary 'odd' to be a tensor.*but got object in it.*Choose"),
        (["empty"], r"tensors to cross boundary 'empty', but got an output without any\. Choose"),
        (["frozen"], r"differentiable tensor to cross boundary 'frozen'.*Unfreeze"),
    ],
)
def test_boundaries_that_cannot_be_cut_are_refused(boundaries, says):
    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, h):
            return self.value if self.value is not None else h.detach()

    def forward(m, x):
        m.odd(x), m.empty(x), m.frozen(x)
        return m.d(m.b(m.b(m.a(x))))

    net = Given(forward)
    net.spare, net.same = nn.Linear(2, 2), net.a
    net.odd, net.empty, net.frozen = Returns(object()), Returns(()), Returns(None)
    with pytest.raises(BoundaryError, match=says):
        traced(net, boundaries)


def test_without_gradients_nothing_needs_to_be_differentiable():
    net = mlp().requires_grad_(False)
    plan, _ = traced(net, ["0"], grad=False)
    assert not plan.crossing["0"].leaves[0].requires_grad


def test_nested_tensors_are_refused():
    """Which nn.TransformerEncoder makes of padded batches where nothing is differentiated."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[0, -1] = True
            return self.encoder(x, src_key_padding_mask=padding)

    model, x = Padded().eval(), torch.randn(3, 4, 8)
    with torch.no_grad():
        plan = trace_stages(model, ["encoder.layers.0"], lambda: model(x), grad=False)
        with pytest.raises(BoundaryError, match=r"'encoder.layers.0', but got a nested one.*enable_nested"):
            check_split(model, plan, lambda: model(x))


def test_nothing_is_left_of_a_trace():
    net = cnn().train()
    before, attributes = buffers_of(net), [sorted(vars(m)) for m in net.modules()]
    state = torch.get_rng_state()
    traced(net, ["a", "b"], batch=images())
    state_after_batch = torch.get_rng_state()
    torch.set_rng_state(state)
    batch = images()
    assert torch.equal(torch.get_rng_state(), state_after_batch)
    assert same_bits(buffers_of(net), before)
    assert [sorted(vars(m)) for m in net.modules()] == attributes
    assert all(p.grad is None for p in net.parameters())
    assert batch[0].shape == (4, 3, 8, 8)


def test_nothing_is_left_of_a_trace_that_fails():
    net = mlp()
    attributes = [sorted(vars(m)) for m in net.modules()]

    def run():
        net[0](vectors()[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_stages(net, ["0"], run)
    assert [sorted(vars(m)) for m in net.modules()] == attributes


def test_a_plan_can_be_copied():
    plan, _ = traced(FAMILIES["dictionary"].make(), ["b"], FAMILIES["dictionary"].step)
    assert copy.deepcopy(plan) == plan


def test_there_is_one_stage_more_than_boundaries():
    plan, _ = traced(Net(a=block(5, 6)), ["a"])
    for stage in (-1, 2):
        with pytest.raises(StageError, match=rf"`stage` in \[0, 2\).*but got {stage}\. There is one"):
            plan.check(stage)
