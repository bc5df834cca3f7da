"""Naive autograd twins: what the engine claims to compute, written out by hand with nothing shared."""

from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


class NaiveLinearDNI:
    """cDNI with hA + yB + C after every stage but the last, as a hand-written loop.

    Every stage is run on the detached output of the one below, differentiated against its synthetic
    gradient, and its input's gradient is the target of the estimator below. `bp_lambda` mixes.
    """

    def __init__(self, stages, widths, num_classes, bp_lambda=0.0, lr=1e-2):
        dtype = next(stages[0].parameters()).dtype
        self.stages, self.num_classes, self.bp_lambda = stages, num_classes, bp_lambda
        self.maps = []
        for width in widths:
            linear = nn.Linear(width + num_classes, width, dtype=dtype)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.maps.append(linear)
        self.optimizer = torch.optim.Adam([p for m in self.maps for p in m.parameters()], lr=lr)

    def predict(self, k, h, y):
        return self.maps[k](torch.cat([h, F.one_hot(y, self.num_classes).to(h.dtype)], 1))

    def gradients(self, x, y):
        """Accumulate the stages' gradients and step the estimators; returns the loss."""
        rows = len(x)
        inputs, outputs = [x], []
        for stage in self.stages[:-1]:
            outputs.append(stage(inputs[-1]))
            inputs.append(outputs[-1].detach().requires_grad_())
        loss = F.cross_entropy(self.stages[-1](inputs[-1]), y)
        loss.backward()
        incoming = inputs[-1].grad
        self.optimizer.zero_grad()
        for k in reversed(range(len(outputs))):
            synthetic = self.predict(k, inputs[k + 1].detach(), y)
            target = incoming * rows
            ((synthetic - target) ** 2).sum(1).mean().backward()
            mixed = (1 - self.bp_lambda) * synthetic.detach() / rows + self.bp_lambda * incoming
            outputs[k].backward(mixed)
            incoming = inputs[k].grad
        self.optimizer.step()
        return loss.detach()


def mlp_stages(widths, num_classes, batch_norm, dtype=torch.float64):
    """Stages (linear, [batch norm,] ReLU) and a linear one on top."""
    stages = []
    for a, b in pairwise(widths):
        norm = [nn.BatchNorm1d(b)] if batch_norm else []
        stages.append(nn.Sequential(nn.Linear(a, b), *norm, nn.ReLU()))
    stages.append(nn.Linear(widths[-1], num_classes))
    return nn.Sequential(*stages).to(dtype)


def true_gradients(stages, x, y):
    """dL/dh of the summed loss at the output of every stage but the last, by plain backprop."""
    hs = []
    h = x
    for stage in stages[:-1]:
        h = stage(h)
        h.retain_grad()
        hs.append(h)
    F.cross_entropy(stages[-1](h), y, reduction="sum").backward()
    return [h.grad for h in hs]


def decoupled_backward(stages, x, loss_of, synthetic, lambdas, denominators=None):
    """Gradients of a chain of stages under any synthetic gradients and lambdas, cut by cut.

    Args:
        stages: Modules run one after another, each on the detached output of the one below.
        x: Input of the first.
        loss_of: Loss of the last output.
        synthetic: For every cut a function of `h` that gives SG(h), or None for no gradient.
        lambdas: For every cut its lambda.
        denominators: For every cut what SG(h) is divided by; None: the number of rows.

    Returns:
        The loss, and for every cut what came back from above, in units of the loss (None for nothing).
    """
    inputs, outputs = [x], []
    for stage in stages[:-1]:
        outputs.append(stage(inputs[-1]))
        inputs.append(outputs[-1].detach().requires_grad_())
    loss = loss_of(stages[-1](inputs[-1]))
    loss.backward()
    arrived = [None] * len(outputs)
    for k in reversed(range(len(outputs))):
        arrived[k] = inputs[k + 1].grad
        back = torch.zeros_like(outputs[k]) if arrived[k] is None else arrived[k]
        given = None if synthetic[k] is None else synthetic[k](outputs[k].detach())
        if given is None and (lambdas[k] == 0 or arrived[k] is None):
            continue
        given = torch.zeros_like(back) if given is None else given
        divisor = len(x) if denominators is None else denominators[k]
        outputs[k].backward((1 - lambdas[k]) * given / divisor + lambdas[k] * back)
    return loss.detach(), arrived


def plain_gradients(model, x, loss_of, boundaries):
    """Loss and dL/dh at the named modules, by backprop through an uncut forward pass.

    The weights' gradients are in `.grad`.
    """
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, h, name=name: seen.setdefault(name, []).append(h)
        )
        for name in boundaries
    ]
    loss = loss_of(model(x))
    for handle in handles:
        handle.remove()
    hs = [h for found in seen.values() for h in found]
    for h in hs:
        h.retain_grad()
    loss.backward()
    return loss.detach(), {name: torch.cat([h.grad for h in found]) for name, found in seen.items()}


def scores_by_hand(head, row, h):
    """What ClassHead computes, in torch's own words; `head` is nn.Sequential."""
    if row.kind == "map":
        h = F.adaptive_avg_pool2d(h, 4).flatten(1)
    scores = head(h)
    return scores.mean(1) if row.context == "labels" and scores.ndim == 3 else scores


def head_by_hand(estimator):
    layers = []
    for layer in estimator.head.stack.layers:
        twin = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        twin.load_state_dict(layer.state_dict())
        layers += [nn.ReLU(), twin]
    return nn.Sequential(*layers[1:])


class CriticsByHand:
    """A chain of stages that follow the labels through a head each, while the heads learn as they are told.

    Args:
        stages: Modules run one after another, each on the detached output of the one below.
        heads: nn.Sequential for every stage but the last.
        scores: Gives the scores of a head for its activation.
        loss_of: The network's loss of scores and classes, a mean over rows.
        lesson: Gives a head's loss from its number, activation (with its gradient), what came back there (of
            the summed loss), the network's output, the scores of the head above (None above the topmost) and
            the classes.
        lr: Learning rate of plain SGD for all of them.
    """

    def __init__(self, stages, heads, scores, loss_of, lesson, lr=0.1):
        self.stages, self.heads = stages, heads
        self.scores, self.loss_of, self.lesson = scores, loss_of, lesson
        self.optimizer = torch.optim.SGD([p for m in (stages, *heads) for p in m.parameters()], lr=lr)

    def step(self, x, classes):
        """One step of everything; returns the loss."""
        self.optimizer.zero_grad()
        cut, outputs = [x], []
        for stage in self.stages[:-1]:
            outputs.append(stage(cut[-1]))
            cut.append(outputs[-1].detach().requires_grad_())
        output = self.stages[-1](cut[-1])
        loss = self.loss_of(output, classes)
        loss.backward()
        targets = [None] * len(outputs)
        for k in reversed(range(len(outputs))):
            targets[k] = cut[k + 1].grad * len(x)
            h = outputs[k].detach().requires_grad_()
            (given,) = torch.autograd.grad(self.loss_of(self.scores(self.heads[k], h), classes), h)
            outputs[k].backward(given)
        hs = [h.detach() for h in outputs]
        said = [self.scores(head, h).detach() for head, h in zip(self.heads, hs, strict=True)]
        told = [(h.requires_grad_(), t, output.detach()) for h, t in zip(hs, targets, strict=True)]
        for k, (head, above) in enumerate(zip(self.heads, [*said[1:], None], strict=True)):
            learnt = self.lesson(head, *told[k], above, classes)
            parameters = list(head.parameters())
            for p, g in zip(parameters, torch.autograd.grad(learnt, parameters), strict=True):
                p.grad = g
        self.optimizer.step()
        return loss.detach()


class FeedbackByHand:
    """Backprop, FA, DFA and Kickback of a chain of layers with ReLU between them, without autograd.

    Args:
        layers: nn.Linear or nn.Conv2d, whose weights and biases are trained by plain SGD.
        rule: "backprop", "fa", "dfa" or "kickback".
        error: The derivative of the batch's loss with respect to the output, from output and targets.
        matrices: For every layer but the first, what replaces its weight ("fa"); for every layer but the
            last, what takes the output's error to its activation ("dfa").
        before_relu: Whether the direct rules give their gradient to what goes into ReLU, not to what comes
            out.
        lr: Learning rate.
    """

    def __init__(self, layers, rule, error, matrices=None, before_relu=False, lr=0.1):
        self.layers, self.rule, self.error = layers, rule, error
        self.before_relu = before_relu and rule in ("dfa", "kickback")
        self.matrices, self.lr = matrices, lr
        self.sent = []

    def step(self, x, y):
        """One step of SGD; returns the output. `sent` holds what each activation was given, lowest first."""
        inputs, outputs = [], []
        with torch.no_grad():
            for k, layer in enumerate(self.layers):
                x = x.flatten(1) if isinstance(layer, nn.Linear) else x
                inputs.append(x)
                outputs.append(self._forward(layer, x))
                x = outputs[-1].clamp(min=0) if k < len(self.layers) - 1 else outputs[-1]
            error = self.error(x, y)
            given, made, self.sent = error, [], []
            for k in reversed(range(len(self.layers))):
                made.append(self._weight_gradient(self.layers[k], inputs[k], given))
                if k == 0:
                    break
                arrived = self._to_activation(k, inputs[k], given, error).view_as(outputs[k - 1])
                self.sent.insert(0, arrived)
                given = arrived if self.before_relu else arrived * (outputs[k - 1] > 0)
            for layer, (weight, bias) in zip(reversed(self.layers), made, strict=True):
                layer.weight -= self.lr * weight
                layer.bias -= self.lr * bias
        return x

    def _forward(self, layer, x):
        if isinstance(layer, nn.Linear):
            return x @ layer.weight.t() + layer.bias
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    def _weight_gradient(self, layer, x, given):
        if isinstance(layer, nn.Linear):
            return given.t() @ x, given.sum(0)
        weight = nn.grad.conv2d_weight(x, layer.weight.shape, given, layer.stride, layer.padding)
        return weight, given.sum((0, 2, 3))

    def _to_activation(self, k, below, given, error):
        """What the activation under layer `k` is given, of the shape of `below`."""
        if self.rule == "kickback":
            return error.sum(1, keepdim=True).expand(-1, below[0].numel())
        if self.rule == "dfa":
            return error @ self.matrices[k - 1]
        layer = self.layers[k]
        weight = self.matrices[k - 1] if self.rule == "fa" else layer.weight
        if isinstance(layer, nn.Linear):
            return given @ weight
        return nn.grad.conv2d_input(below.shape, weight, given, layer.stride, layer.padding)


class PaperDNI:
    """DNI in the order of the paper, every stage with an optimizer of its own.

    Run a stage on the detached output of the one below, ask the estimator, update the stage; what that has
    left at its input is the target of the estimator below, which is updated; go on to the next stage.

    Args:
        stages: Modules run one after another.
        estimators: Modules of (h, y), one for every stage but the last.
        optimizer: Makes an optimizer from a module, for every stage.
        estimator_optimizer: The same for every estimator.
    """

    def __init__(self, stages, estimators, optimizer, estimator_optimizer):
        self.stages, self.estimators = stages, estimators
        self.optimizers = [optimizer(stage) for stage in stages]
        self.estimator_optimizers = [estimator_optimizer(estimator) for estimator in estimators]

    def step(self, x, y, awake=None, loss_of=F.cross_entropy, order=None):
        """One step, in which stages that are not `awake` run forward only; returns the loss.

        With an `order`, no stage is updated before all have run forward; then they are, in that order.
        """
        passed, below, updates = x, None, {}
        for k, stage in enumerate(self.stages):
            x = passed.detach().requires_grad_()
            h = stage(x)
            synthetic = self.estimators[k](h.detach(), y) if k < len(self.estimators) else None
            loss = loss_of(h, y) if synthetic is None else None
            updates[k] = partial(self._update, k, x, h, synthetic, loss, below)
            if order is None and (awake is None or awake[k]):
                updates[k]()
            passed, below = h, synthetic
        for k in order or ():
            if awake is None or awake[k]:
                updates[k]()
        return loss.detach()

    def _update(self, k, x, h, synthetic, loss, below):
        self.optimizers[k].zero_grad()
        if synthetic is None:
            loss.backward()
        else:
            h.backward(synthetic.detach() / len(x))
        self.optimizers[k].step()
        if below is not None:
            self._teach(k - 1, below, x.grad * len(x))

    def _teach(self, k, synthetic, target):
        self.estimator_optimizers[k].zero_grad()
        (F.mse_loss(synthetic, target, reduction="sum") / len(target)).backward()
        self.estimator_optimizers[k].step()


class LinearMap(nn.Module):
    """hA + yB + C, zero at first."""

    def __init__(self, width, num_classes, dtype):
        super().__init__()
        self.num_classes = num_classes
        self.map = nn.Linear(width + num_classes, width, dtype=dtype)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, h, y):
        return self.map(torch.cat([h, F.one_hot(y, self.num_classes).to(h.dtype)], 1))


def sparse_backprop(stages, x, y, awake, loss_of=F.cross_entropy):
    """Backprop that ends at the first stage from the top that is not awake; gradients are in `.grad`."""
    h = x
    for k, stage in enumerate(stages):
        for p in stage.parameters():
            p.requires_grad_(all(awake[k:]))
        h = stage(h)
    loss = loss_of(h, y)
    if awake[-1]:
        loss.backward()
    for p in stages.parameters():
        p.requires_grad_()
    return loss.detach()
