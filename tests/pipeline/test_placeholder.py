"""Nothing from below a boundary gets past it unseen, whatever the code of the user does with it."""

import pytest
import torch
from pipeline.families import CLASSES, FAMILIES, Net
from pipeline.nets import classify, received, run_stage, traced, vectors
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError
from lightning_dni.pipeline.placeholder import Below
from lightning_dni.pipeline.splitting import StageRunner


class Skipping(Net):
    """`meet` joins the output of `a` with that of `b`, which is the boundary."""

    def __init__(self, meet):
        super().__init__()
        self.meet = meet
        self.scale = nn.Parameter(torch.rand(6))
        self.table = nn.Embedding(6, 6)

    def forward(self, x):
        low = self.a(x)
        return self.d(self.meet(self, low, self.b(low)))


def indices(low):
    return (low[:, 0] * 0).long()


def add_in_place(m, low, h):
    h = h.clone()
    h += low
    return h


def set_items(m, low, h):
    h = h.clone()
    h[:, :2] = low[:, :2]
    return h


def from_numbers(m, low, h):
    return h * low.mean().item()


# torch itself computes numbers from several of these without an error where one side has no values
MEETINGS = [
    lambda m, low, h: h + low,
    lambda m, low, h: low + h,
    add_in_place,
    set_items,
    lambda m, low, h: torch.cat([h[:, 1:], low[:, :1]], 1),
    lambda m, low, h: h @ (low.T @ low),
    lambda m, low, h: h[indices(low)],
    lambda m, low, h: h.gather(1, indices(low)[:, None].expand(-1, 6)),
    lambda m, low, h: h.scatter(1, indices(low)[:, None], 1.0),
    lambda m, low, h: h + m.table(indices(low)),
    lambda m, low, h: h + m.c(low),
    lambda m, low, h: F.conv1d(h[None], low[:, :, None].expand(6, 6, 1))[0],
    lambda m, low, h: h if bool(low.mean() > 100) else 2 * h,
    from_numbers,
    lambda m, low, h: h * float(low.sum()),
    lambda m, low, h: low,
    lambda m, low, h: torch.einsum("ij,ij->ij", h, low),
    lambda m, low, h: h + nn.LSTM(6, 6)(low)[0],
]


@pytest.mark.parametrize("meet", MEETINGS, ids=range(len(MEETINGS)))
def test_a_skip_connection_across_a_boundary_is_refused(meet):
    model = Skipping(meet)
    plan, step = traced(model, ["b"])
    with pytest.raises(
        BoundaryError, match=r"stage 1 to need nothing from below boundary 'b'.*skip conn.*Move"
    ):
        run_stage(model, plan, 1, step)
    run_stage(model, plan, 0, step)


@pytest.mark.parametrize(
    ("family", "boundary"),
    [("resnet", "block_0.residual.1"), ("resnet", "block_1.residual"), ("gpt-2", "block_1.attention.1")],
)
def test_a_boundary_inside_of_a_residual_block_is_refused(family, boundary):
    make, _, batch, step = FAMILIES[family]
    model = make()
    plan, step = traced(model, [boundary], step, batch())
    rows = plan.crossing[boundary].leaves[0].shape[0]
    with StageRunner(model, plan, 1) as runner, pytest.raises(BoundaryError, match="skip connection past"):
        runner.run(step, lambda: received(plan, 1, rows))


def test_code_between_modules_is_run_on_shapes_once(monkeypatch):
    ran = []
    shapes = Below.shapes
    monkeypatch.setattr(
        Below, "shapes", lambda self, func, *rest: ran.append(func) or shapes(self, func, *rest)
    )
    model = Between(lambda h, x: (h + x.mean()) * 2)
    plan, step = traced(model, ["b"])
    counts = []
    with StageRunner(model, plan, 1) as runner:
        for _ in range(3):
            runner.run(step, lambda: received(plan, 1))
            counts.append(len(ran))
    assert counts[0] == counts[1] == counts[2] > 0


class Derived(Net):
    """What is made of a parameter below the boundary is used above it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        scale = 2 * self.scale
        return self.d(self.b(self.a(x)) * scale)


def test_a_parameter_of_another_stage_does_not_pass_by_what_is_made_of_it():
    model = Derived()
    plan, step = traced(model, ["b"])
    assert plan.owner("scale") == 0
    with pytest.raises(BoundaryError, match=r"below boundary 'b'.*a tensor from below in `mul`.*Move"):
        run_stage(model, plan, 1, step)


class Stashing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(5, 6), None

    def forward(self, x):
        h = self.linear(x)
        self.seen = h.pow(2)
        return h


def with_penalty(model, batch):
    return classify(model, batch) + model.a.seen.mean()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stashed_activation_of_another_stage_is_refused(steps):
    model = Net(a=Stashing())
    plan, step = traced(model, ["b"], with_penalty)
    for _ in range(steps):
        with pytest.raises(BoundaryError, match=r"a tensor from below in `mean`"):
            run_stage(model, plan, 1, step)


def test_a_tensor_from_below_is_not_returned():
    def step(model, batch):
        low = model.a(batch[0])
        return {"loss": F.cross_entropy(model.d(model.c(model.b(low))), batch[1]), "low": [low]}

    model = Net()
    plan, step = traced(model, ["b"], step)
    with pytest.raises(BoundaryError, match=r"a tensor from below in the value that the step returned"):
        run_stage(model, plan, 1, step)


def test_a_tensor_from_below_is_not_given_away():
    class Chooses(nn.Module):
        def forward(self, low, h):
            return low

    class Choosing(Net):
        def forward(self, x):
            low = self.a(x)
            return self.d(self.c(low, self.b(low)))

    model = Choosing(c=Chooses())
    plan, step = traced(model, ["b", "c"])
    with pytest.raises(BoundaryError, match=r"a tensor from below in the output of boundary 'c'"):
        run_stage(model, plan, 1, step)


class Between(Net):
    """`between` stands between the modules `a` and `b`."""

    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        return self.d(self.c(self.b(self.between(self.a(x), x))))


def shift_batch(h, x):
    x[:, 0] = h[:, 0]
    return h


def add_to_batch(h, x):
    x.add_(h.mean())
    return h


@pytest.mark.parametrize("between", [shift_batch, add_to_batch])
def test_a_batch_that_is_changed_by_an_activation_is_refused(between):
    model = Between(between)
    batch = vectors()
    step = lambda model, _: classify(model, (batch[0].clone(), batch[1]))
    plan, step = traced(model, ["b"], step)
    with pytest.raises(BoundaryError, match=r"a change in place of a tensor of the batch by `.*`\. Use the"):
        run_stage(model, plan, 1, step)


@pytest.mark.parametrize(
    "between",
    [
        lambda h, x: h if h.mean() > 0 else -h,
        lambda h, x: h * h.std().item(),
        lambda h, x: torch.from_numpy(h.detach().numpy()),
    ],
)
def test_code_below_that_needs_values_is_refused(between):
    model = Between(between)
    plan, step = traced(model, ["a", "b"], grad=False)
    with pytest.raises(BoundaryError, match=r"between the modules below it .*without values .*of its own"):
        run_stage(model, plan, 2, step)


def hooked(h, x):
    h.retain_grad()
    h.register_hook(lambda grad: None).remove()
    return h


def added_in_place(h, x):
    h = h.clone()
    h += 1
    h.unsqueeze_(0)
    return h.squeeze_(0).mul_(2)


# what code between two modules does with shapes, places and constants
HARMLESS = [
    lambda h, x: h + torch.arange(6, device=h.device) * torch.ones_like(h) + h.new_ones(6),
    lambda h, x: h.to(x.device).cpu().to("cpu", torch.float32).to(device=h.device).to(x),
    lambda h, x: h.view(h.size(0), -1).reshape(len(h), 2, 3).flatten(1).contiguous(),
    lambda h, x: torch.cat([h[:, :3], h[:, 3:]], dim=1) + x.mean(1, keepdim=True),
    lambda h, x: h.T.T if h.is_cpu and not h.is_meta and h.device.type == "cpu" else None,
    lambda h, x: F.layer_norm(F.dropout(h, 0.5), (6,)).masked_fill(h > 0, 0.0),
    lambda h, x: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
    lambda h, x: sum(h.unbind(1))[:, None] + torch.stack([h, h]).sum(0),
    hooked,
    added_in_place,
]


@pytest.mark.parametrize("between", HARMLESS, ids=range(len(HARMLESS)))
def test_code_below_that_needs_no_values_runs(between):
    model = Between(between)
    plan, step = traced(model, ["a", "b"])
    h = received(plan, 2)
    with StageRunner(model, plan, 2) as runner:
        loss = runner.run(step, lambda: h)
    batch_labels = torch.arange(6) % CLASSES
    assert torch.equal(loss, F.cross_entropy(model.d(model.c(h)), batch_labels))


def test_a_refusal_stands_where_the_user_catches_it():
    def step(model, batch):
        low = model.a(batch[0])
        h = model.b(low)
        try:
            h = h + low
        except Exception:
            h = 2 * h
        return F.cross_entropy(model.d(model.c(h)), batch[1])

    model = Net()
    plan, step = traced(model, ["b"], step)
    with pytest.raises(BoundaryError, match="skip connection"):
        run_stage(model, plan, 1, step)


def test_refusals_do_not_outlast_their_run():
    model = Skipping(lambda m, low, h: h + low if m.skips else h)
    model.skips = False
    plan, step = traced(model, ["b"])
    with StageRunner(model, plan, 1) as runner:
        model.skips = True
        with pytest.raises(BoundaryError, match="skip connection"):
            runner.run(step, lambda: received(plan, 1))
        model.skips = False
        assert runner.run(step, lambda: received(plan, 1)).requires_grad
