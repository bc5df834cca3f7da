"""The stages of a model, each on its own copy as in its own process; and the whole model."""

import copy

import torch

from lightning_dni.pipeline.splitting import StageRunner


def loss_of(value):
    return value["loss"] if isinstance(value, dict) else value


def tensors_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}


def parameters_of(model):
    return {n: p for n, p in tensors_of(model).items() if isinstance(p, torch.nn.Parameter)}


def buffers_of(model):
    return {n: b.clone() for n, b in tensors_of(model).items() if not isinstance(b, torch.nn.Parameter)}


def grads_of(model):
    return {n: p.grad for n, p in parameters_of(model).items()}


class Whole:
    """One step of a copy of the uncut model: loss, gradients, buffers, and the generator at each boundary."""

    def __init__(self, model, boundaries, step, backward=True):
        model = copy.deepcopy(model)
        self.states = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: self.states.update({name: torch.get_rng_state()})
            )
            for name in boundaries
        ]
        start = torch.get_rng_state()
        self.loss = loss_of(step(model))
        if backward:
            self.loss.backward()
        torch.set_rng_state(start)
        for handle in handles:
            handle.remove()
        self.gradients, self.buffers = grads_of(model), buffers_of(model)


def spoil(model, plan, stage):
    """Other stages' parameters and buffers have no values here."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if not plan.holds(stage, name) and tensor.is_floating_point():
                tensor.fill_(float("nan"))


class Chain:
    """The same step by the stages, top gradients passed down."""

    def __init__(self, model, plan, step, states, backward=True):
        self.plan, self.states = plan, states
        self.copies = [copy.deepcopy(model) for _ in range(plan.stages)]
        self.given, self.received, value = [], [], None
        start = torch.get_rng_state()
        for stage, part in enumerate(self.copies):
            spoil(part, plan, stage)
            torch.set_rng_state(start)
            with StageRunner(part, plan, stage) as runner:
                value = runner.run(
                    lambda part=part: step(part),
                    self.receive if stage else None,
                    self.given.append if stage < plan.stages - 1 else None,
                )
        self.loss = loss_of(value)
        if backward:
            self.backward()
        torch.set_rng_state(start)

    def receive(self):
        boundary = self.plan.boundaries[len(self.given) - 1]
        torch.set_rng_state(self.states[boundary])
        crossing = self.plan.crossing[boundary]
        sent = crossing.pack(self.given[-1])
        self.received.append([x.detach().requires_grad_(x.requires_grad) for x in sent])
        return crossing.unpack(self.received[-1])

    def backward(self):
        self.loss.backward()
        for stage in reversed(range(len(self.given))):
            sent = self.plan.crossing[self.plan.boundaries[stage]].pack(self.given[stage])
            pairs = [
                (x, r.grad) for x, r in zip(sent, self.received[stage], strict=True) if r.grad is not None
            ]
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])

    def of_owners(self, collect):
        """What `collect` finds on the copies, every tensor from the stage that owns it."""
        found = [collect(part) for part in self.copies]
        return {name: found[self.plan.owner(name)][name] for name in found[0]}

    def strays(self):
        """Gradients of parameters on stages that do not own them."""
        return [
            (stage, name)
            for stage, part in enumerate(self.copies)
            for name, grad in grads_of(part).items()
            if grad is not None and self.plan.owner(name) != stage
        ]
