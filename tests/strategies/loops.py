"""Hand-written loops that a fit under DNIStrategy must equal, and the comparison with the plain Trainer."""

import copy
from functools import partial

import torch
from fits import BOUNDARIES, CLASSES, Losses, different, dni, fit, loader, weights
from oracles import NaiveLinearDNI

from lightning_dni.estimators import MLPEstimator

MLP = partial(MLPEstimator, hidden_sizes=(8,), num_classes=CLASSES)
ADAM = partial(torch.optim.Adam, lr=1e-2)
"""The estimators' optimizer in the fits that a hand-written loop repeats."""


class Idle:
    """Stands where the twin would step: the loop around it decides when."""

    def step(self):
        pass

    def zero_grad(self):
        pass


class HandLoop(NaiveLinearDNI):
    """The twin with the user's loop around it: everybody takes one step per window of batches.

    `stages` are trained in place; the estimators of each cut have an optimizer of their own.
    """

    def __init__(self, stages, optimizer, width=8):
        super().__init__(stages, [width] * (len(stages) - 1), CLASSES)
        self.optimizer, self.user = Idle(), optimizer
        self.teachers = [ADAM(m.parameters()) for m in self.maps]

    def clear(self):
        self.user.zero_grad()
        for teacher in self.teachers:
            teacher.zero_grad()

    def learn(self, batches, divisor=1):
        """Gradients of the mean over `divisor` batches, of which `batches` are there."""
        for x, y in batches:
            before = [(p, p.grad) for p in self.parameters()]
            for p, _ in before:
                p.grad = None
            self.gradients(x, y)
            for p, grad in before:
                if p.grad is not None:
                    p.grad = p.grad / divisor if grad is None else grad + p.grad / divisor
                else:
                    p.grad = grad

    def step(self):
        self.user.step()
        for teacher in self.teachers:
            teacher.step()

    def window(self, batches, divisor=None, clip=None):
        self.clear()
        self.learn(batches, len(batches) if divisor is None else divisor)
        if clip is not None:
            clip([p for group in self.user.param_groups for p in group["params"]])
        self.step()

    def parameters(self):
        return [*self.stages.parameters(), *(p for m in self.maps for p in m.parameters())]


def double(batches):
    return [(x.double(), y) for x, y in batches]


def epoch(accumulate, batches):
    """The windows of one epoch, the last one short where the batches do not come out even."""
    return [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def by_hand(module):
    """A float64 copy of the stages of `module`."""
    return copy.deepcopy(module.net).double()


def assert_twins(module, strategy, loop):
    """Weights and estimators are those of the hand-written loop."""
    got = module.state_dict()
    for name, weight in loop.stages.state_dict().items():
        torch.testing.assert_close(got[f"net.{name}"].double(), weight, rtol=0, atol=1e-10)
    for name, linear in zip(BOUNDARIES, loop.maps, strict=True):
        estimator = strategy.engine.estimators[name]
        together = torch.cat([estimator.map.weight, estimator.conditioning.weight.T], 1)
        torch.testing.assert_close(together, linear.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(estimator.map.bias, linear.bias, rtol=0, atol=1e-10)


def linear_dni(**options):
    return dni(**{"estimator_optimizer": ADAM, **options})


def trained(module, strategy, train=None, callbacks=(), **options):
    """A fit of a copy of `module`; what it ends with."""
    module, losses = copy.deepcopy(module), Losses()
    train = loader(shuffle=True) if train is None else train()
    trainer = fit(module, strategy, train, callbacks=[losses, *callbacks], **options)
    return trainer, weights(module), losses


def assert_plain(module, train=None, callbacks=list, **options):
    """With bp_lambda=1 the fit is the plain Trainer's bit for bit; returns both Trainers."""
    trainers, ends, losses = zip(
        *(
            trained(module, strategy, train, callbacks(), **options)
            for strategy in ("auto", dni(bp_lambda=1.0, estimator=MLP))
        ),
        strict=True,
    )
    assert different(*ends) == []
    for one, other in ((losses[0].train, losses[1].train), (losses[0].val, losses[1].val)):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=0, equal_nan=True)
    return trainers
