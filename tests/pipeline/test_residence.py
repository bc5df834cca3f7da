"""What a stage holds is brought to its device; all else stays where it is."""

import torch
from pipeline.families import Net, block, classify, vectors
from pipeline.nets import run_stage, traced
from torch import nn

from lightning_dni.pipeline.residence import bring_part, bring_state
from lightning_dni.pipeline.splitting import StageRunner


class Shared(Net):
    """A batch norm below, a buffer that both stages read, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__(a=nn.Sequential(block(5, 6), nn.BatchNorm1d(6)))
        self.register_buffer("mask", torch.ones(6))
        self.register_buffer("again", self.mask)
        self.idle = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        h = self.a(x) * self.mask
        return self.d(self.c(self.b(h)) * self.mask)


def brought(stage, model=None):
    """The names of what was asked for on `stage`, and the model after it; a copy stands for a device."""
    model = model or Shared()
    plan, step = traced(model, ["b"])
    named = {t.data_ptr(): n for n, t in model.named_buffers()} | {
        p.data_ptr(): n for n, p in model.named_parameters()
    }
    asked = []

    def bring(tensor):
        asked.append(named[tensor.data_ptr()])
        return tensor.clone()

    bring_part(model, plan, stage, bring)
    return asked, model, plan, step


def test_each_stage_brings_its_own_and_what_is_shared():
    low, high = brought(0)[0], brought(1)[0]
    parts = {"a.0.0.weight", "a.0.0.bias", "a.1.weight", "a.1.bias", "b.0.weight", "b.0.bias"}
    running = {"a.1.running_mean", "a.1.running_var", "a.1.num_batches_tracked"}
    assert set(low) == parts | running | {"mask"}
    assert set(high) == {"c.0.weight", "c.0.bias", "d.weight", "d.bias", "idle", "mask"}
    assert len(low) == len(set(low))
    assert len(high) == len(set(high))


def test_parameters_stay_the_same_objects_and_others_stay_where_they_are():
    model = Shared()
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    classify(model, vectors()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    asked = []
    plan, _ = traced(model, ["b"])
    bring_part(model, plan, 0, lambda t: asked.append(t) or t.clone())
    for name, parameter in model.named_parameters():
        own = plan.owner(name) == 0
        assert parameter is before[name][0]
        assert (parameter.data_ptr() != before[name][1]) is own
        assert (parameter.grad is not gradients[name]) is own


def test_a_buffer_with_two_names_stays_one():
    _, model, _, _ = brought(1)
    assert model.mask is model.again


def test_a_stage_computes_what_it_did_after_its_part_has_moved():
    torch.manual_seed(1)
    _, model, plan, step = brought(1)
    torch.manual_seed(2)
    found = run_stage(model, plan, 1, step)[0]
    torch.manual_seed(1)
    still = Shared()
    plan, step = traced(still, ["b"])
    torch.manual_seed(2)
    expected = run_stage(still, plan, 1, step)[0]
    assert torch.equal(found, expected)


def test_what_is_on_no_device_of_the_stage_is_not_needed():
    """Parameters of other stages without storage stand for those that were left on the CPU."""
    model = Shared()
    plan, step = traced(model, ["b"])
    torch.manual_seed(2)
    expected = run_stage(model, plan, 1, step)[0]
    for name, parameter in list(model.named_parameters()):
        if plan.owner(name) == 0:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.detach().to("meta")))
    torch.manual_seed(2)
    assert torch.equal(run_stage(model, plan, 1, step)[0], expected)


def test_code_below_a_stage_believes_to_be_on_its_device():
    seen = []

    class Asking(Net):
        def forward(self, x):
            h = self.a(x)
            seen.append(h.device.type)
            return self.d(self.c(self.b(h)))

    model = Asking()
    plan, step = traced(model, ["b"])
    seen.clear()
    with StageRunner(model, plan, 1, torch.device("cuda", 0)) as runner:
        runner.run(step, lambda: torch.zeros(6, 6, requires_grad=True))
    assert seen == ["cuda"]


def test_a_recurrent_network_is_flat_again():
    flat = []

    class Recurrent(nn.GRU):
        def flatten_parameters(self):
            flat.append(len(self._flat_weights))

    class Reads(Net):
        def forward(self, x):
            return self.d(self.c(self.b(self.a(x)[0])))

    model = Reads(a=Recurrent(5, 6))
    plan, _ = traced(model, ["b"])
    flat.clear()
    bring_part(model, plan, 1, torch.clone)
    assert flat == []
    bring_part(model, plan, 0, torch.clone)
    assert flat == [4]


def test_an_optimizers_state_follows_its_parameter():
    """Except for the number of steps, which Adam reads on the CPU unless it is fused."""
    parameter = nn.Parameter(torch.ones(2))
    for fused in (False, True):
        optimizer = torch.optim.Adam([parameter], fused=fused)
        parameter.grad = torch.ones(2)
        optimizer.step()
        state = {k: v.to(torch.float64) for k, v in optimizer.state[parameter].items()}
        moved = nn.Parameter(torch.ones(2, device="meta"))
        optimizer.param_groups[0]["params"] = [moved]
        optimizer.state = {moved: state}
        bring_state(optimizer)
        assert state["exp_avg"].is_meta
        assert state["exp_avg_sq"].is_meta
        assert state["step"].is_meta is fused
