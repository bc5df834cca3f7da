"""An asynchronous pipeline written out by hand: every stage keeps its graphs, on copies of its weights."""

from collections import deque

from torch.func import functional_call


class StashingStages:
    """Delayed gradients (Huo et al. 2018): all stages in turn, with one mailbox per boundary.

    In a step every stage runs forward on its weights of now; then, from the top, each takes what was put into
    the mailbox above it `delay` steps ago, pulls it back through the graph of that batch, and mails what that
    leaves below. A graph is one on copies of the weights, made in its forward pass.

    Args:
        stages: Modules run one after another; their `.grad` is where gradients go.
        delays: For every boundary its delay; None where the stage below is given sin(h) per row at once.
    """

    def __init__(self, stages, delays):
        self.stages, self.delays = stages, delays
        self.graphs = [deque() for _ in delays]
        self.mail = [deque() for _ in delays]

    def step(self, batches, loss_of):
        """Gradients of one optimizer step into `.grad`; returns the losses."""
        runs, losses = self._forward(batches, loss_of)
        for loss in losses:
            loss.div(len(batches)).backward()
        self._take(len(self.delays), runs[-1])
        for k in reversed(range(len(self.delays))):
            self.graphs[k].append(runs[k])
            given = self._given(k, runs[k])
            if given is None:
                continue
            run = self.graphs[k].popleft()
            for (out, *_), gradient in zip(run, given, strict=True):
                out.backward(gradient)
            self._take(k, run)
        return [loss.detach() for loss in losses]

    def _forward(self, batches, loss_of):
        runs, losses = [[] for _ in self.stages], []
        for x, y in batches:
            h = x
            for stage, run in zip(self.stages, runs, strict=True):
                copies = {n: p.detach().clone().requires_grad_() for n, p in stage.named_parameters()}
                below = h.detach().requires_grad_()
                h = functional_call(stage, copies, below)
                run.append((h, copies, below))
            losses.append(loss_of(h, y))
        return runs, losses

    def _given(self, k, run):
        if self.delays[k] is None:
            self.mail[k].clear()
            return [out.detach().sin() * (1.0 / (len(out) * len(run))) for out, *_ in run]
        return self.mail[k].popleft() if len(self.mail[k]) > self.delays[k] else None

    def _take(self, k, run):
        """Add what the copies have got to the weights' own, and mail what the stage leaves below."""
        for _, copies, _ in run:
            for name, parameter in self.stages[k].named_parameters():
                gradient = copies[name].grad
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        if k:
            self.mail[k - 1].append([below.grad for _, _, below in run])
