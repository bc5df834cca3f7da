"""The stages under exact schedules, without processes: bit for bit the plain loop that accumulates."""

import copy

import pytest
import torch
from core.nets import CLASSES, blobs, mlp
from pipeline.staged import OPTIMIZERS, WIDTHS, batches, loss_of
from torch import nn
from torch.nn import functional as F

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError, EstimatorError, StageError
from lightning_dni.estimators import ZeroEstimator
from lightning_dni.pipeline.exact import ExactEngine
from lightning_dni.pipeline.microbatch import split_batch
from lightning_dni.pipeline.schedule import EXACT
from lightning_dni.pipeline.together import ExactStagesTogether

either = pytest.mark.parametrize("schedule", EXACT)


def together(model, data, schedule="1f1b", microbatches=2, optimizer="sgd", loss_of=loss_of):
    boundaries = [str(k) for k in range(len(model) - 1)]
    return ExactStagesTogether(
        model,
        boundaries,
        loss_of,
        OPTIMIZERS[optimizer],
        data[0],
        schedule=schedule,
        microbatches=microbatches,
        seed=3,
    )


def plain(model, data, microbatches=2, optimizer="sgd", accumulate=1, loss_of=loss_of):
    """The loop that adds up gradients over microbatches; returns the mean loss of each batch."""
    user, losses = OPTIMIZERS[optimizer](model.parameters()), []
    for i in range(0, len(data), accumulate):
        user.zero_grad()
        for batch in data[i : i + accumulate]:
            parts = [loss_of(model, part) for part in split_batch(batch, microbatches)]
            for loss in parts:
                (loss / (microbatches * accumulate)).backward()
            losses.append(torch.stack(parts).detach().mean())
        user.step()
    return losses


def assert_same_bits(stages, model):
    for name, value in stages.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@either
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_are_the_plain_loop_that_accumulates(schedule, optimizer, microbatches, stages):
    """With batch norm, and with batches of 8 rows and of 3, which do not come out even."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[stages], batch_norm=microbatches < 3, dtype=torch.float32), batches(20)
    staged = together(model, data, schedule, microbatches, optimizer)
    before = copy.deepcopy(staged.state_dict())
    if microbatches == 2:  # batch norm refuses the single row that a batch of 3 would leave
        data = [batch for batch in data if len(batch[0]) == 8] + [blobs(rows=5, dtype=torch.float32)]
    losses = [staged.step([batch])[0] for batch in data]
    expected = plain(model, data, microbatches, optimizer)
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert_same_bits(staged, model)
    moved = [n for n, value in before.items() if not torch.equal(value, staged.state_dict()[n])]
    assert {n.partition(".")[0] for n in moved} == {str(k) for k in range(stages)}


@either
def test_several_batches_add_up_to_one_update(schedule):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(12)
    staged = together(model, data, schedule, 3)
    losses = [loss for i in range(0, 12, 3) for loss in staged.step(data[i : i + 3])]
    assert torch.equal(torch.stack(losses), torch.stack(plain(model, data, 3, accumulate=3)))
    assert_same_bits(staged, model)


@either
@pytest.mark.parametrize("microbatches", [2, 3])
def test_dropout_draws_the_masks_of_one_process_with_streams_per_stage(schedule, microbatches):
    """`DNIEngine` at lambda 1 is backprop, and draws from such streams too."""
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dropout=0.4, dtype=torch.float32), batches(10)
    staged = together(model, data, schedule, microbatches, "adam")
    for batch in data:
        staged.step([batch])
    boundaries = [str(k) for k in range(len(model) - 1)]
    engine = DNIEngine(model, boundaries, ZeroEstimator, rng="stage", seed=3, bp_lambda=1.0)
    user = OPTIMIZERS["adam"](model.parameters())
    with engine:
        for batch in data:
            user.zero_grad()
            for part in split_batch(batch, microbatches):
                with engine.training_step(part, accumulate=microbatches):
                    loss = loss_of(model, part) / microbatches
                engine.backward(loss)
            user.step()
    assert_same_bits(staged, model)


@either
def test_stages_under_autocast_are_the_plain_loop(schedule):
    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], dtype=torch.float32), batches(10)
    staged = together(model, data, schedule, 3, loss_of=loss_of)
    assert staged.plan.crossing["0"].leaves[0].dtype == torch.bfloat16
    losses = [staged.step([batch])[0] for batch in data]
    assert torch.equal(torch.stack(losses), torch.stack(plain(model, data, 3, loss_of=loss_of)))
    assert_same_bits(staged, model)


@either
def test_frozen_stages_get_nothing_and_send_nothing(schedule):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dtype=torch.float32), batches(5)
    staged = together(model, data, schedule, 3)
    for each in (model, *staged.models):  # as a callback does in mid-fit
        each[0].requires_grad_(False)
        each[2].requires_grad_(False)
    for batch in data:
        staged.step([batch])
    assert all(p.grad is None for p in staged.models[0].parameters())
    plain(model, data, 3)
    assert_same_bits(staged, model)


@either
def test_a_loss_that_does_not_depend_on_a_part_of_the_rows_leaves_no_gradient(schedule):
    """Some losses are a penalty on the last layer alone: below, there is no gradient at all."""

    def loss_of(model, batch):
        outputs = model(batch[0])
        return outputs.mean() if batch[1][0] else model[-1].weight.square().sum()

    torch.manual_seed(0)
    model = mlp(WIDTHS[3], dtype=torch.float32)
    data = [(torch.randn(4, 5), torch.tensor([i, i, 0, 0])) for i in (1, 0, 1, 0)]
    staged = together(model, data, schedule, 2, loss_of=loss_of)
    for batch in data:
        staged.step([batch])
        if not batch[1].any():
            assert all(p.grad is None for p in staged.models[0].parameters())
    plain(model, data, 2, loss_of=loss_of)
    assert_same_bits(staged, model)


class TwoTensors(nn.Module):
    """A stage whose output is a dictionary of two tensors and a number."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x):
        return {"one": torch.tanh(self.one(x)), "other": self.other(x), "scale": 2}


class Joins(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, parts):
        return self.linear(parts["one"] * parts["scale"] + parts["other"].detach())


@either
def test_several_tensors_cross_and_one_gets_no_gradient(schedule):
    torch.manual_seed(0)
    model, data = nn.Sequential(TwoTensors(), Joins()), batches(10)
    staged = together(model, data, schedule, 3)
    for batch in data:
        staged.step([batch])
    assert all(p.grad is None for p in staged.models[0][0].other.parameters())
    plain(model, data, 3)
    assert_same_bits(staged, model)


def test_no_more_activations_are_kept_than_the_schedule_says():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[4], dtype=torch.float32), batches(1)
    most = {}
    for schedule in EXACT:
        staged, seen = together(model, data, schedule, 8), [0] * 4
        for engine in staged.engines:
            take = engine.take

            def counted(each, step, engine=engine, take=take, seen=seen):
                take(each, step)
                seen[engine.stage] = max(seen[engine.stage], len(engine._flights))

            engine.take = counted
        staged.step([data[0]] if len(data[0][0]) == 8 else [blobs(dtype=torch.float32)])
        assert [len(engine._flights) for engine in staged.engines] == [0] * 4
        most[schedule] = seen
    assert most == {"gpipe": [8] * 4, "1f1b": [4, 3, 2, 1]}


def test_evaluation_between_batches_changes_nothing():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[3], batch_norm=True, dtype=torch.float32), batches(6)
    data = [batch for batch in data if len(batch[0]) == 8]
    staged = together(model, data)
    for batch in data:
        staged.step([batch])
        for engine, copied in zip(staged.engines, staged.models, strict=True):
            copied.eval()
            with torch.no_grad():
                loss = engine.evaluate(lambda m=copied, b=batch: loss_of(m, b), batch)
            copied.train()
    plain(model, data)
    assert_same_bits(staged, model)
    model.eval()
    assert torch.equal(loss, loss_of(model, data[-1]))


def test_hooks_on_parameters_run_once_per_microbatch():
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[2], dtype=torch.float32), batches(1)
    staged, seen = together(model, data, microbatches=3), []
    staged.models[0][0][0].weight.register_hook(lambda g: seen.append(g))
    staged.step(data)
    assert len(seen) == 3


def test_what_the_gradients_were_before_is_there_until_the_trainer_clears_it():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, CLASSES)), blobs(dtype=torch.float32)
    staged = together(model, [batch])
    own = staged.models[1][1].weight
    old = own.grad = torch.ones_like(own)
    with staged.engines[0].training_step(batch), staged.engines[1].training_step(batch):
        staged._take_turns()
    assert own.grad is old
    assert torch.equal(old, torch.ones_like(own))
    own.grad = None
    staged.engines[1].finish_backward()
    plain_model = copy.deepcopy(model)
    for part in split_batch(batch, 2):
        (loss_of(plain_model, part) / 2).backward()
    assert torch.equal(own.grad, plain_model[1].weight.grad)


# ---- refused


def test_a_parameter_of_another_stage_is_refused():
    def loss_of(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if len(batch[0]) == 5 else loss + model[0][0].weight.square().sum()

    torch.manual_seed(0)
    model, data = mlp(WIDTHS[2], dtype=torch.float32), [blobs(rows=5, dtype=torch.float32)]
    staged = together(model, data, loss_of=loss_of)
    with pytest.raises(BoundaryError, match=r"Expected stage 1 to use its own parameters only, but got 1 of"):
        staged.step([blobs(rows=8, dtype=torch.float32)])


@pytest.mark.parametrize("options", [{"several_losses": True}, {"scale": lambda: torch.ones(())}])
def test_several_losses_and_a_gradient_scaler_are_refused(options):
    torch.manual_seed(0)
    model, data = mlp(WIDTHS[2], dtype=torch.float32), batches(1)
    engine = together(model, data).engines[0]
    with (
        pytest.raises(StageError, match="one loss per microbatch and no gradient scaler"),
        engine.training_step(data[0], **options),
    ):
        pass


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.set_bp_lambda(1.0),
        lambda engine: engine.request_probe(),
    ],
)
def test_what_is_about_synthetic_gradients_is_refused(ask):
    engine = ExactEngine(mlp(), ["0"], schedule="gpipe", microbatches=2)
    with pytest.raises(EstimatorError, match=r"Expected synthetic gradients for .*schedule='gpipe'"):
        ask(engine)
    assert (engine.bp_lambda, engine.skipped, engine.estimators, engine.last_report) == ({}, {}, {}, None)
    assert engine.describe() | {"seed": 0} == {
        "boundaries": ["0"],
        "stages": 2,
        "schedule": "gpipe",
        "microbatches": 2,
        "rng": "global",
        "seed": 0,
    }


def test_an_estimator_is_never_made():
    engine = ExactEngine(mlp(), ["0"])
    with pytest.raises(EstimatorError, match="Expected no estimator at '0' under an exact schedule"):
        engine._pool.install("0", [torch.zeros(2, 3)])


def test_an_engine_of_no_schedule_is_refused():
    with pytest.raises(StageError, match="Expected `schedule` to be one of"):
        ExactEngine(mlp(), ["0"], schedule="dni")
