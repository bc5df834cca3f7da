"""Manual optimization: any number of optimizers, one backward pass through each forward pass."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from fits import BOUNDARIES, CLASSES, AtBatchEnd, Net, different, dni, fit, hooks_on, net, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.nn import functional as F

from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator, LocalLossEstimator, ZeroEstimator

TWO_EPOCHS = {"max_epochs": 2}


class ByHand(Net):
    """What automatic optimization does, by hand; `when` gradients are zeroed is up to the user."""

    def __init__(self, when="before", every=1, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.when, self.every = when, every

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        first = batch_idx % self.every == 0
        if self.when == "before" and first:
            optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.when == "between" and first:
            optimizer.zero_grad()
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()


def by_hand(**options):
    torch.manual_seed(0)
    return ByHand(**options)


# ---- one optimizer


@pytest.mark.parametrize("bp_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("when", ["before", "between"])
def test_by_hand_is_automatic_bit_for_bit(when, bp_lambda):
    automatic, manual = net(dropout=0.2), by_hand(when=when, dropout=0.2)
    strategies = [dni(bp_lambda=bp_lambda), dni(bp_lambda=bp_lambda)]
    for module, strategy in zip((automatic, manual), strategies, strict=True):
        fit(module, strategy, **TWO_EPOCHS)
    assert different(weights(automatic), weights(manual)) == []
    for name in BOUNDARIES:
        learnt = [weights(s.engine.estimators[name]) for s in strategies]
        assert different(*learnt) == []
        assert any(t.any() for t in learnt[0].values())


def test_accumulation_by_hand_steps_the_estimators_once_per_step():
    updates = []

    def look(trainer, module, batch_idx):
        updates.append(weights(trainer.strategy.engine.estimators["net.1"]))

    fit(by_hand(every=2), dni(), callbacks=[AtBatchEnd(look)])
    moved = [different(a, b) != [] for a, b in pairwise(updates)]
    assert moved == [True, False] * 4 + [True]


@pytest.mark.parametrize("told", [True, False])
def test_a_local_loss_has_to_be_told_that_the_loss_is_divided_by_hand(told):
    ends = []
    for module, options, rate in (
        (net(), {"accumulate_grad_batches": 2}, 0.1),
        (by_hand(every=2), {}, 0.1 / 2),  # lessons of accumulated batches are summed, not averaged
    ):
        strategy = dni(
            estimator=partial(LocalLossEstimator, num_classes=CLASSES),
            estimator_optimizer=partial(torch.optim.SGD, lr=rate),
            loss_denominator="batch" if options or not told else lambda batch, h: 2.0 * len(h),
        )
        fit(module, strategy, **options)
        ends.append(weights(module))
    assert (different(*ends) == []) is told


@pytest.mark.parametrize("every", [1, 2])
def test_backprop_by_hand_is_plain_backprop_by_hand(every):
    cut, plain = by_hand(every=every), by_hand(every=every)
    fit(cut, dni(bp_lambda=1.0), **TWO_EPOCHS)
    fit(plain, **TWO_EPOCHS)
    assert different(weights(cut), weights(plain)) == []


def test_one_backward_pass_through_each_forward_pass():
    class Twice(ByHand):
        def training_step(self, batch, batch_idx):
            out = self(batch[0])
            self.manual_backward(F.cross_entropy(out, batch[1]), retain_graph=True)
            self.manual_backward(out.square().mean())

    torch.manual_seed(0)
    with pytest.raises(
        BoundaryError, match=r"one backward pass through each.*boundary 'net\.1'.*Add the losses"
    ):
        fit(Twice(), dni())


@pytest.mark.parametrize("bp_lambda", [0.0, 1.0])
def test_a_boundary_that_the_loss_came_past_is_refused(bp_lambda):
    class Past(ByHand):
        def forward(self, x):
            return self.net[2](self.net[1].forward(self.net[0](x)))

    torch.manual_seed(0)
    with pytest.raises(BoundaryError, match=r"every boundary to run.*\['net\.1'\] did not"):
        fit(Past(), dni(bp_lambda=bp_lambda))


def test_a_closure_is_evaluated_once():
    class Closing(ByHand):
        def configure_optimizers(self):
            return Again(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            def closure():
                self.optimizers().zero_grad()
                loss = F.cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            self.optimizers().step(closure=closure)

    class Again(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match="Again, which evaluates it several times"):
        fit(Closing(), dni())


# ---- several


class Adversaries(Net):
    """A generator `net` and a discriminator, each cut; trained in turns on every batch."""

    def __init__(self, shared=False, toggled=True, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.shared, self.toggled, self.every = shared, toggled, every
        self.judge = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.net, self.judge)]

    def verdict(self, sample, truth):
        verdict = self.judge(sample)
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, truth))

    def training_step(self, batch, batch_idx):
        noise, real = batch[0], F.one_hot(batch[1], 3).float()
        first, second = self.optimizers()
        fake = self.net(noise) if self.shared else None
        self.begin(second)
        loss = self.verdict(real, 1.0) + self.verdict(
            self.net(noise).detach() if fake is None else fake.detach(), 0.0
        )
        self.manual_backward(loss)
        second.step()
        self.end(second)
        if batch_idx % self.every == 0:
            self.begin(first)
            self.manual_backward(self.verdict(self.net(noise) if fake is None else fake, 1.0))
            first.step()
            self.end(first)

    def begin(self, optimizer):
        optimizer.zero_grad()
        if self.toggled:
            self.toggle_optimizer(optimizer)

    def end(self, optimizer):
        if self.toggled:
            self.untoggle_optimizer(optimizer)


def adversaries(**options):
    torch.manual_seed(0)
    return Adversaries(**options)


CUTS = ["net.0", "net.1", "judge.1", "judge.3"]


@pytest.mark.parametrize(
    "options", [{}, {"shared": True, "toggled": False}, {"toggled": False}, {"every": 3}], ids=str
)
def test_backprop_of_adversaries_is_the_plain_trainers_bit_for_bit(options):
    cut, plain = adversaries(**options), adversaries(**options)
    fit(cut, dni(boundaries=CUTS, estimator=ZeroEstimator, bp_lambda=1.0), **TWO_EPOCHS)
    fit(plain, **TWO_EPOCHS)
    assert different(weights(cut), weights(plain)) == []
    assert different(weights(adversaries()), weights(cut)) == list(weights(cut))
    assert hooks_on(cut) == 0


@pytest.mark.parametrize("options", [{}, {"shared": True, "toggled": False}], ids=str)
def test_nothing_leaks_past_a_cut_of_either(options):
    module = adversaries(**options)
    fit(module, dni(boundaries=CUTS, estimator=ZeroEstimator), **TWO_EPOCHS)
    moved = {name.rpartition(".")[0] for name in different(weights(adversaries()), weights(module))}
    assert moved == {"judge.4"}  # the generator's last layer lies below the discriminator's cuts


def test_each_estimator_learns_from_the_losses_that_came_through_it():
    strategy = dni(boundaries=CUTS, estimator=LinearEstimator, labels=None)
    fit(adversaries(), strategy, **TWO_EPOCHS)
    learnt = {n: any(bool(p.any()) for p in e.parameters()) for n, e in strategy.engine.estimators.items()}
    assert learnt == dict.fromkeys(CUTS, True)


def test_two_optimizers_over_one_net_are_the_plain_trainers():
    class Halves(ByHand):
        def configure_optimizers(self):
            return [torch.optim.SGD(half.parameters(), lr=0.1) for half in (self.net[:2], self.net[2:])]

        def training_step(self, batch, batch_idx):
            both = self.optimizers()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for optimizer in both:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in both:
                optimizer.step()

    found = []
    for strategy in (dni(bp_lambda=1.0), "auto"):
        torch.manual_seed(0)
        module = Halves()
        fit(module, strategy, **TWO_EPOCHS)
        found.append(weights(module))
    assert different(*found) == []


def test_a_report_covers_every_backward_pass_of_the_batch():
    seen = []

    class Look(AtBatchEnd):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.strategy.engine.request_probe()

    def look(trainer, module, batch_idx):
        seen.append(set(trainer.strategy.engine.last_report.boundaries))

    strategy = dni(boundaries=CUTS, estimator=LinearEstimator, labels=None)
    fit(adversaries(), strategy, callbacks=[Look(look)])
    assert seen == [set(CUTS)] * 10


# ---- the profiler


@pytest.mark.parametrize("kind", [Net, ByHand])
def test_the_phases_of_a_step_are_timed_by_name(kind):
    profiler = SimpleProfiler()

    class Probing(AtBatchEnd):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                trainer.strategy.engine.request_probe()

    torch.manual_seed(0)
    strategy = dni()
    fit(kind(), strategy, profiler=profiler, callbacks=[Probing(lambda *_: None)])
    calls = {
        name: len(times) for name, times in profiler.recorded_durations.items() if name.startswith("dni.")
    }
    assert calls == {"dni.local_backward": 20, "dni.estimator_step": 10, "dni.probe": 1}
