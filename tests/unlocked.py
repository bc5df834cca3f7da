"""A complete unlock written out by hand: every stage runs on a prediction of its input, and on its own."""

from oracles import LinearMap
from torch import nn


class Predictor(nn.Module):
    """One hidden layer with batch norm from the network's input to what a stage makes; zero at first."""

    def __init__(self, inputs, hidden, width, dtype):
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden, dtype=dtype)
        self.norm = nn.BatchNorm1d(hidden, dtype=dtype)
        self.last = nn.Linear(hidden, width, dtype=dtype)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        return self.last(self.norm(self.hidden(x)).relu())


class UnlockedDNI:
    """Each stage by itself: its input is a prediction from x, its gradient a prediction from its output.

    The predictor of a stage's output learns from that output; the synthetic gradient is taught, at the
    predicted input of the stage above, the gradient that this stage has found there.

    Args:
        stages: Modules, of which each but the first takes what the one before makes.
        widths: What each but the last makes.
        num_classes: Of the labels that synthetic gradients see.
        predictors: One per width, or None where the stage above is given the real thing.
    """

    def __init__(self, stages, widths, num_classes, predictors):
        dtype = next(stages[0].parameters()).dtype
        self.stages, self.predictors = stages, predictors
        self.maps = [LinearMap(width, num_classes, dtype) for width in widths]

    def gradients(self, x, y, loss_of, share=1.0, awake=None):
        """Accumulate all gradients, of a forward pass that is a `share` of the step; returns the loss."""
        rows, awake, above = len(x), awake or [True] * len(self.stages), x
        for k, stage in enumerate(self.stages):
            taken = above.detach().requires_grad_()
            out = stage(taken)
            if k == len(self.stages) - 1:
                loss = loss_of(out, y)
                if awake[k]:
                    (loss * share).backward()
            else:
                above = self._pass_on(k, x, out, share if awake[k] else None)
                if awake[k]:
                    out.backward(self.maps[k](out.detach(), y).detach() / rows * share)
            if k and awake[k]:
                said, target = self.maps[k - 1](taken.detach(), y), taken.grad * rows / share
                ((said - target).square().sum(1).mean() * share).backward()
        return loss.detach()

    def _pass_on(self, k, x, out, share):
        """What the stage above is given; the predictor learns unless `share` is None."""
        if self.predictors[k] is None:
            return out
        predicted = self.predictors[k](x)
        if share is not None:
            ((predicted - out.detach()).square().sum(1).mean() * share).backward()
        return predicted
