"""Stages in processes under the Trainer: one process bit for bit without a lag, the lagged loop with one."""

from functools import partial

import pytest
import torch
from core.nets import VECTOR_ESTIMATORS
from fits import CLASSES, LINEAR, OPTIMIZERS, Net, dataset, fit, loader, net, weights
from lightning.pytorch.plugins.precision import Precision
from strategies.pipelined import STAGES, Case, fit_cases, once
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni.core import GradientEstimator, Signal
from lightning_dni.demos import GPT
from lightning_dni.estimators import (
    CriticCascade,
    DelayedGradientEstimator,
    DirectFeedbackAlignmentEstimator,
    FeedbackAlignmentEstimator,
    KickbackEstimator,
)
from lightning_dni.pipeline.together import StagesTogether
from lightning_dni.strategies.placement import Trial


class FedDicts(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["label"]), batch_idx)


class Regression(Net):
    def training_step(self, batch, batch_idx):
        wanted = F.one_hot(batch[1], CLASSES).float()
        loss = F.mse_loss(self(batch[0]), wanted)
        self.log("loss", loss)
        return loss


class Summed(Net):
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / 10
        self.log("loss", loss)
        return loss


class Gates(nn.Module):
    """Two functions of the input that take no gradient."""

    def forward(self, x):
        high = x.detach().amax(1, keepdim=True)
        return high.sigmoid(), high > 1


class Gated(Net):
    """The second and third stage read what the first one has made beside its activation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gates = Gates()

    def forward(self, x):
        gate, closed = self.gates(x)
        h = self.net[1](self.net[0](x)) * gate
        return self.net[2](h.masked_fill(closed, 0.0))


class Words(Net):
    """A GPT that predicts the next token."""

    def __init__(self):
        super().__init__()
        self.net = GPT(vocabulary=11, context_length=8, width=8, heads=2, layers=2, dropout=0.1)

    def training_step(self, batch, batch_idx):
        scores = self(batch[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss)
        return loss


class Sick(GradientEstimator):
    """Linear in `h`; every seventh gradient that it gives is infinite."""

    needs = frozenset({Signal.TARGET})

    def __init__(self, spec):
        super().__init__()
        self.map, self.calls = nn.Linear(spec.shape[0], spec.shape[0]), 0

    def synthesize(self, h, context, state):
        self.calls += 1
        return (self.map(h[0]) / (0.0 if self.calls % 7 == 0 else 1.0),), None

    def loss(self, record, feedback):
        return F.mse_loss(record.gradient[0], feedback.target[0])


def made(kind, **options):
    torch.manual_seed(0)
    return kind(**options)


def dicts():
    rows = [{"x": x, "label": y} for x, y in dataset(76)]
    return DataLoader(rows, 8)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randint(0, 11, (76, 9), generator=generator), 8)


def four(**options):
    return partial(net, dropout=0.3, batch_norm=True, hidden=3, **options)


CASCADE = partial(CriticCascade, num_classes=CLASSES, hidden_sizes=(8,))
WITHOUT_LAG = {
    2: {
        "linear": Case(),
        "lambda 0.5": Case(options={"bp_lambda": 0.5}),
        "lambda 1": Case(options={"bp_lambda": 1.0}),
        "cascade": Case(options={"estimator": CASCADE}),
        "feedback alignment": Case(options={"estimator": FeedbackAlignmentEstimator}),
        "transformer": Case(
            partial(made, Words),
            {"boundaries": ["net.block_0"], "labels": None, "estimator": VECTOR_ESTIMATORS["linear"].func},
            data=tokens,
        ),
    },
    3: {
        "adam": Case(partial(net, dropout=0.3, batch_norm=True, optimizer="adam")),
        "bf16-mixed": Case(trainer={"precision": "bf16-mixed"}),
        "accumulation": Case(trainer={"accumulate_grad_batches": 3}),
        "accumulation, lambda 0.5": Case(options={"bp_lambda": 0.5}, trainer={"accumulate_grad_batches": 3}),
        "lambda 0.5": Case(options={"bp_lambda": 0.5}),
        "lambda 1": Case(options={"bp_lambda": 1.0}),
        **{name: Case(options={"estimator": made}) for name, made in VECTOR_ESTIMATORS.items()},
        "critic, accumulation": Case(
            options={"estimator": VECTOR_ESTIMATORS["critic"]}, trainer={"accumulate_grad_batches": 3}
        ),
        "critic, one update per epoch": Case(
            options={"estimator": VECTOR_ESTIMATORS["critic"]}, trainer={"accumulate_grad_batches": 10}
        ),
        "cascade, accumulation": Case(options={"estimator": CASCADE}, trainer={"accumulate_grad_batches": 3}),
        "direct feedback alignment": Case(options={"estimator": DirectFeedbackAlignmentEstimator}),
        "feedback alignment, bf16-mixed": Case(
            options={"estimator": FeedbackAlignmentEstimator}, trainer={"precision": "bf16-mixed"}
        ),
        "kickback, accumulation": Case(
            partial(made, Regression),
            {"loss_denominator": "elements", "estimator": KickbackEstimator},
            trainer={"accumulate_grad_batches": 3},
        ),
        "beside the activation": Case(partial(made, Gated, dropout=0.3)),
        "dict": Case(partial(made, FedDicts, dropout=0.3), {"labels": "label"}, data=dicts),
        "sum": Case(partial(made, Summed), {"loss_denominator": "sum"}),
        "elements": Case(partial(made, Regression), {"loss_denominator": "elements"}),
        "two estimator steps": Case(options={"estimator_steps": 2}),
        "estimator scheduler": Case(
            options={"estimator_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=5, gamma=0.5)}
        ),
        "estimator clipping": Case(options={"estimator_clip_norm": 0.05}),
        "skip": Case(options={"estimator": Sick, "on_nonfinite": "skip"}),
    },
    4: {
        "linear": Case(four()),
        "adam": Case(four(optimizer="adam")),
        "critic": Case(four(), {"estimator": VECTOR_ESTIMATORS["critic"]}),
        "cascade": Case(four(), {"estimator": CASCADE}),
        "feedback alignment": Case(four(), {"estimator": FeedbackAlignmentEstimator}),
        "lambda 0.5": Case(four(), {"bp_lambda": 0.5}),
        "lambda 1": Case(four(), {"bp_lambda": 1.0}),
    },
}
PLAIN = {
    stages: Case(partial(net, batch_norm=True, hidden=stages - 1), {"bp_lambda": 1.0}) for stages in STAGES
}
WITH_LAG = {
    3: {
        **{f"linear {lag}": Case(options={"staleness": lag}) for lag in (1, 2, 4)},
        "beside the activation 2": Case(partial(made, Gated, dropout=0.3), {"staleness": 2}),
        "mlp 2": Case(options={"staleness": 2, "estimator": VECTOR_ESTIMATORS["mlp"]}),
        "cascade 1": Case(options={"staleness": 1, "estimator": CASCADE}),
        "accumulation 2": Case(options={"staleness": 2}, trainer={"accumulate_grad_batches": 5}),
    },
    4: {
        "critic 1, accumulation": Case(
            four(),
            {"staleness": 1, "estimator": VECTOR_ESTIMATORS["critic"]},
            trainer={"accumulate_grad_batches": 5},
        ),
        "critic 2": Case(four(), {"staleness": 2, "estimator": VECTOR_ESTIMATORS["critic"]}),
        "cascade 2, accumulation": Case(
            four(), {"staleness": 2, "estimator": CASCADE}, trainer={"accumulate_grad_batches": 5}
        ),
        "local_loss 1": Case(four(), {"staleness": 1, "estimator": VECTOR_ESTIMATORS["local_loss"]}),
    },
}
DELAYED = {
    3: {
        f"{optimizer} {lag}": Case(
            partial(net, dropout=0.3, batch_norm=True, optimizer=optimizer),
            {"estimator": partial(DelayedGradientEstimator, delay=lag), "staleness": lag},
        )
        for optimizer, lag in (("sgd", 2), ("adam", 1))
    },
    4: {"sgd 1": Case(four(), {"estimator": DelayedGradientEstimator, "staleness": 1})},
}


@once
def pipelined(stages):
    """Every fit with that many stages, in one set of processes."""
    cases = {("no lag", name): case for name, case in WITHOUT_LAG[stages].items()}
    cases |= {("lag", name): case for name, case in WITH_LAG.get(stages, {}).items()}
    cases |= {("delayed", name): case for name, case in DELAYED.get(stages, {}).items()}
    return fit_cases(stages, {**cases, ("no lag", "plain"): PLAIN[stages]})


def named(table):
    return [pytest.param(stages, name, id=f"{stages} {name}") for stages in table for name in table[stages]]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_all_ranks_end_with(found, expected):
    """The same whole module on every rank."""
    for rank in found:
        assert_same(rank["weights"], expected)


def assert_estimators(found, expected):
    """Each on the rank of its stage, and nowhere else."""
    held = [name for rank in found for name in rank["estimators"]]
    assert sorted(held) == sorted(expected)
    for rank in found:
        for name, state in rank["estimators"].items():
            assert_same(state, expected[name].state_dict())


@pytest.mark.parametrize(("stages", "name"), named(WITHOUT_LAG))
def test_without_lag_a_pipeline_is_one_process(stages, name):
    found, case = pipelined(stages)["no lag", name], WITHOUT_LAG[stages][name]
    losses, module, strategy = case.in_one_process(stages)
    assert len(losses) == 50
    assert found[0]["losses"] == losses
    assert_all_ranks_end_with(found, weights(module))
    assert_estimators(found, strategy.engine.estimators)
    before = weights(case.make())
    moved = {n for n, _ in module.named_parameters() if not torch.equal(found[0]["weights"][n], before[n])}
    if name != "zero":
        assert moved == {n for n, p in module.named_parameters()}
    else:
        assert all(n.startswith("net.2") for n in moved)
    assert moved


@pytest.mark.parametrize(("stages", "name"), named(DELAYED))
def test_with_delayed_gradients_a_pipeline_is_one_process(stages, name):
    found, case = pipelined(stages)["delayed", name], DELAYED[stages][name]
    losses, module, _ = case.in_one_process(stages)
    assert found[0]["losses"] == losses
    assert_all_ranks_end_with(found, weights(module))
    before = weights(case.make())
    assert all(different(before[n], p) for n, p in module.named_parameters())


def different(one, other):
    return not torch.equal(one, other)


def test_what_was_skipped_is_counted():
    """Guard: the case above has something to skip."""
    found = pipelined(3)["no lag", "skip"]
    _, _, strategy = WITHOUT_LAG[3]["skip"].in_one_process(3)
    assert strategy.engine.skipped == {"net.0": 7, "net.1": 7}
    assert {k: max(rank["skipped"].get(k, 0) for rank in found) for k in ("net.0", "net.1")} == {
        "net.0": 7,
        "net.1": 7,
    }


@pytest.mark.parametrize("stages", STAGES)
def test_at_lambda_one_a_pipeline_is_the_plain_trainer(stages):
    found, case = pipelined(stages)["no lag", "plain"], PLAIN[stages]
    module = case.make()
    fit(module, "auto", case.data(), max_epochs=case.epochs)
    assert_all_ranks_end_with(found, weights(module))


@pytest.mark.parametrize(("stages", "name"), named(WITH_LAG))
def test_with_a_lag_a_pipeline_is_the_stages_in_turn(stages, name):
    found, case = pipelined(stages)["lag", name], WITH_LAG[stages][name]
    data = list(case.data()) * case.epochs
    together = StagesTogether(
        case.make(),
        STAGES[stages],
        case.options.get("estimator", LINEAR),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        OPTIMIZERS["sgd"],
        data[0],
        case.options["staleness"],
        seed=0,
    )
    window = case.trainer.get("accumulate_grad_batches", 1)
    losses = [together.step(data[i : i + window]).item() for i in range(0, len(data), window)]
    if window == 1:  # else the last loss was divided and multiplied again
        assert found[0]["losses"] == losses
    assert_all_ranks_end_with(found, together.state_dict())
    assert_estimators(found, {n: e for each in together.engines for n, e in each.estimators.items()})


def test_a_lag_changes_the_run():
    """Guard: the lags above are told apart."""
    ends = [pipelined(3)["lag", f"linear {lag}"][0]["weights"]["net.0.0.weight"] for lag in (1, 2, 4)]
    assert not any(torch.equal(a, b) for a, b in ((ends[0], ends[1]), (ends[1], ends[2])))


def test_the_stages_of_an_evaluation_are_found_in_inference_mode():
    """In which Lightning evaluates under any backend but gloo."""
    module, batch = net(batch_norm=True), next(iter(loader()))
    with torch.inference_mode():
        trial = Trial(module, "validation_step", (batch, 0), Precision())
        plan = trial.plan(["net.0"], None)
    assert (plan.tensors["net.0.1.running_mean"], plan.tensors["net.1.1.running_mean"]) == (0, 1)
