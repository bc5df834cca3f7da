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


class NaiveLaggedCascade:
    """Linear critics that learn, with their weights of now, what the next one said of a batch D updates ago.

    The topmost learns what the network's loss was then.
    """

    def __init__(self, stages, widths, num_classes, staleness, lr=0.05):
        dtype = next(stages[0].parameters()).dtype
        self.stages, self.staleness = stages, staleness
        self.heads = [torch.nn.Linear(width, num_classes, dtype=dtype) for width in widths]
        for parameter in (p for head in self.heads for p in head.parameters()):
            torch.nn.init.zeros_(parameter)
        self.pending = [deque() for _ in self.heads]
        self.optimizers = [torch.optim.SGD(head.parameters(), lr=lr) for head in self.heads]

    def gradients(self, x, y):
        """Accumulate the stages' gradients against the critics'; what the next one says is set aside."""
        h, hs, said = x, [], []
        for stage, head in zip(self.stages[:-1], self.heads, strict=True):
            out = stage(h)
            h = out.detach().requires_grad_()
            losses = F.cross_entropy(head(h), y, reduction="none")
            out.backward(torch.autograd.grad(losses.mean(), h)[0])
            hs.append(h.detach())
            said.append(losses.detach())
        losses = F.cross_entropy(self.stages[-1](h.detach()), y, reduction="none")
        losses.mean().backward()
        for queue, h, above in zip(self.pending, hs, [*said[1:], losses.detach()], strict=True):
            queue.append((h, y, above))
        return losses.mean().detach()

    def update(self):
        """After the stages' own update."""
        for head, queue, optimizer in zip(self.heads, self.pending, self.optimizers, strict=True):
            if len(queue) > self.staleness:
                h, y, above = queue.popleft()
                optimizer.zero_grad()
                (F.cross_entropy(head(h), y, reduction="none") - above).abs().mean().backward()
                optimizer.step()
