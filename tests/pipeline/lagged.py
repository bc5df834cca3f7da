"""A hand-written loop over stages whose estimators learn from what came back D updates ago."""

from collections import deque

import torch
from oracles import NaiveLinearDNI
from torch.nn import functional as F


class NaiveLaggedDNI(NaiveLinearDNI):
    """As the loop without a lag, but an estimator regresses, with its weights of now, what came back then."""

    def __init__(self, stages, widths, num_classes, staleness, lr=0.05):
        super().__init__(stages, widths, num_classes, lr=lr)
        self.pending = [deque() for _ in self.maps]
        self.staleness = staleness
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=lr) for m in self.maps]

    def gradients(self, x, y):
        """Accumulate the stages' gradients against synthetic ones; what came back is set aside."""
        rows, h = len(x), x
        inputs = []
        for k, stage in enumerate(self.stages[:-1]):
            out = stage(h)
            out.backward(self.predict(k, out.detach(), y).detach() / rows)
            if k:
                self.pending[k - 1].append((*inputs[-1], h.grad))
            h = out.detach().requires_grad_()
            inputs.append((h.detach(), y))
        loss = F.cross_entropy(self.stages[-1](h), y)
        loss.backward()
        self.pending[-1].append((*inputs[-1], h.grad))
        return loss.detach()

    def update(self):
        """After the stages' own update."""
        for k, (queue, optimizer) in enumerate(zip(self.pending, self.optimizers, strict=True)):
            if len(queue) <= self.staleness:
                continue
            h, y, arrived = queue.popleft()
            optimizer.zero_grad()
            ((self.predict(k, h, y) - arrived * len(h)) ** 2).sum(1).mean().backward()
            optimizer.step()
