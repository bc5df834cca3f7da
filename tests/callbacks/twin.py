"""A hand-written twin of a fit under linear estimators, which measures by plain backprop and numpy."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Twin:
    """Trains on joint batches as the strategy does and says what a monitor should have seen.

    Args:
        net: Two hidden stages and a linear one, as in `fits.Net`; it is copied.
        classes: Number of classes.
        user: Makes the user's optimizer from parameters.
    """

    def __init__(self, net, classes, user):
        self.net, self.classes = copy.deepcopy(net).double(), classes
        self.maps = []
        for width in (net[0][0].out_features, net[1][0].out_features):
            linear = nn.Linear(width + classes, width, dtype=torch.float64)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.maps.append(linear)
        self.user = user(self.net.parameters())
        self.estimators = torch.optim.Adam([p for m in self.maps for p in m.parameters()], lr=1e-3)

    def step(self, x, y):
        """Take one optimizer step on a batch; returns the metrics by boundary, measured before it."""
        x, rows = x.double(), len(x)
        true, true_weights = self._backprop(x, y)
        h0 = self.net[0](x)
        h1 = self.net[1](cut := h0.detach().requires_grad_())
        synthetic = [self._predict(0, h0.detach(), y), self._predict(1, h1.detach(), y)]
        (below,) = torch.autograd.grad(h1, cut, synthetic[1].detach(), retain_graph=True)
        targets = [below, true[1]]
        applied = [
            torch.autograd.grad(h, list(stage.parameters()), s.detach() / rows)
            for h, stage, s in zip((h0, h1), self.net, synthetic, strict=False)
        ]
        measured = [
            measure(*(g.detach().numpy() for g in (synthetic[k], targets[k], true[k])))
            | measure_weights(flat(applied[k]), flat(true_weights[k]))
            for k in range(2)
        ]
        self._train([*applied, true_weights[2]], synthetic, targets)
        return measured

    def _predict(self, k, h, y):
        return self.maps[k](torch.cat([h, F.one_hot(y, self.classes).double()], 1))

    def _backprop(self, x, y):
        h0 = self.net[0](x)
        h1 = self.net[1](h0)
        loss = F.cross_entropy(self.net[2](h1), y, reduction="sum")
        true = torch.autograd.grad(loss, [h0, h1], retain_graph=True)
        weights = [
            torch.autograd.grad(loss / len(x), list(s.parameters()), retain_graph=True) for s in self.net
        ]
        return true, weights

    def _train(self, gradients, synthetic, targets):
        self.estimators.zero_grad()
        for s, t in zip(synthetic, targets, strict=True):
            (s - t).square().sum(1).mean().backward()
        self.estimators.step()
        for stage, found in zip(self.net, gradients, strict=True):
            for parameter, gradient in zip(stage.parameters(), found, strict=True):
                parameter.grad = gradient
        self.user.step()


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients]).numpy()


def cosine(s, t):
    norms = np.linalg.norm(s) * np.linalg.norm(t)
    return (s.ravel() @ t.ravel()) / norms if norms else 0.0


def over(numerator, denominator):
    """Nothing over nothing is nothing: before their first step the estimators and their targets are zero."""
    return numerator / denominator if numerator else 0.0


def distance(s, t):
    return over(np.linalg.norm(s - t), np.linalg.norm(t))


def measure(synthetic, target, true):
    """Every gradient metric of the design, written out; `[rows, features]` each."""
    nonzero = [k for k, row in enumerate(true) if row.any()]
    return {
        "dni_sg_loss": over(((synthetic - target) ** 2).sum(1).mean(), target.var(axis=0).sum()),
        "dni_sg_error": distance(synthetic, true),
        "dni_true_gradient_cosine": cosine(synthetic, true),
        "dni_row_cosine": np.mean([cosine(synthetic[k], true[k]) for k in nonzero]),
        "dni_zero_rows": 1 - len(nonzero) / len(true),
        "dni_norm_ratio": np.linalg.norm(synthetic) / np.linalg.norm(true),
        "dni_target_error": distance(synthetic, target),
        "dni_target_cosine": cosine(synthetic, target),
        "dni_bootstrap_error": distance(target, true),
    }


def measure_weights(applied, true):
    return {"dni_weight_cosine": cosine(applied, true), "dni_weight_error": distance(applied, true)}
