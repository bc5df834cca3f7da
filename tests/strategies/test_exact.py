"""Exact schedules in processes under the Trainer: bit for bit the plain Trainer that accumulates."""

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from core.nets import unchecked
from fits import LINEAR, AtBatchEnd, Net, dataset, different, dni, fit, loader, net, quiet_trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from processes import ReplicaError, on_ranks
from strategies.pipelined import STAGES, in_turn
from strategies.resuming import Shuffled
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dni import BPLambdaScheduler, DNIPipelineStrategy
from lightning_dni.callbacks.schedulers import LinearWarmup

ROWS = 84
"""The last batch of 8 has 4 rows."""


class Logs(Net):
    """Logs every step's loss and the mean of the epoch, and returns more than the loss."""

    def training_step(self, batch, batch_idx):
        output = self(batch[0])
        loss = F.cross_entropy(output, batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "rows": len(batch[0])}


class Skips(Logs):
    """What the first stage makes meets what the second one makes on the third."""

    def forward(self, x):
        low = self.net[0](x)
        return self.net[2](self.net[1](low) + low)


class Seen(pl.Callback):
    """What was logged, and what `training_step` gave, on every batch and epoch."""

    def __init__(self):
        self.steps, self.outputs, self.epochs, self.val = [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(trainer.callback_metrics["loss_step"].item())
        self.outputs.append(outputs)

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(trainer.callback_metrics["loss_epoch"].item())

    def on_validation_epoch_end(self, trainer, module):
        self.val.append(trainer.callback_metrics["val_loss"].item())


def made(seed=0, kind=Logs, **options):
    torch.manual_seed(seed)
    return kind(**options)


def strategy(stages=2, schedule="1f1b", microbatches=2, **options):
    return DNIPipelineStrategy(
        **{"boundaries": STAGES[stages], "schedule": schedule, "microbatches": microbatches, **options}
    )


def fit_stage(rank, stages, make, options, more, ckpt_path=None, saved=None):
    warnings.simplefilter("ignore")
    seen, module = Seen(), make()
    trainer = quiet_trainer(
        strategy(stages, **options),
        devices=stages,
        callbacks=[seen] if rank == 0 else [],
        **{"max_epochs": 2, "use_distributed_sampler": False, **more},
    )
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer.fit(module, loader(ROWS), loader(16), ckpt_path=ckpt_path)
    if saved is not None:
        trainer.save_checkpoint(saved)
    return {
        "weights": weights(module),
        "seen": seen,
        "step": trainer.global_step,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "warnings": [str(w.message) for w in warned],
    }


def fit_exact(stages, make, options=None, more=None, **rest):
    args = (stages, make, options or {}, more or {}, rest.get("ckpt_path"), rest.get("saved"))
    return on_ranks(fit_stage, *args, world_size=stages, grouped=False, seconds=240)


def fit_plain(module, microbatches=2, accumulate=1, **options):
    """The plain Trainer on the same microbatches."""
    rows = torch.arange(ROWS).split(8)
    parts = [part.tolist() for batch in rows for part in batch.tensor_split(microbatches)]
    seen = Seen()
    trainer = fit(
        module,
        train=DataLoader(dataset(ROWS), batch_sampler=parts),
        val=loader(16),
        **{"max_epochs": 2, "callbacks": [seen], **options},
        accumulate_grad_batches=microbatches * accumulate,
    )
    return trainer, seen


@pytest.mark.parametrize(
    ("stages", "schedule", "microbatches", "make", "more"),
    [
        (2, "gpipe", 4, {}, {"gradient_clip_val": 0.2}),
        (2, "1f1b", 2, {"batch_norm": True}, {"accumulate_grad_batches": 3}),
        (3, "1f1b", 2, {"batch_norm": True, "optimizer": "adam"}, {}),
        (3, "1f1b", 4, {}, {"precision": "bf16-mixed", "val_check_interval": 5, "gradient_clip_val": 0.2}),
        (3, "1f1b", 2, {"kind": Skips, "batch_norm": True}, {}),
    ],
    ids=["gpipe", "accumulated", "1f1b", "bf16", "skip"],
)
def test_a_fit_is_the_plain_fit_that_accumulates(stages, schedule, microbatches, make, more):
    """Weights on every rank; logged values, validation and step count where they are reported."""
    options = {"schedule": schedule, "microbatches": microbatches}
    found = fit_exact(stages, partial(made, **make), options, more)
    module = made(**make)
    extra = dict(more)
    trainer, seen = fit_plain(
        module,
        microbatches,
        extra.pop("accumulate_grad_batches", 1),
        **extra | ({"val_check_interval": 5 * microbatches} if "val_check_interval" in extra else {}),
    )
    for rank, said in enumerate(found):
        assert different(said["weights"], weights(module)) == [], rank
        assert said["step"] == trainer.global_step
    assert different(weights(made(**make)), weights(module)) != []
    got = found[0]["seen"]
    assert got.steps == seen.steps[microbatches - 1 :: microbatches]
    assert got.epochs == seen.epochs
    assert got.val == seen.val
    assert found[0]["metrics"] == {k: float(v) for k, v in trainer.callback_metrics.items()}
    every = [float(o["loss"]) for o in seen.outputs]
    means = [sum(every[i : i + microbatches]) for i in range(0, len(every), microbatches)]
    assert [float(o["loss"]) for o in got.outputs] == pytest.approx(means, rel=1e-6)
    rows = [o["rows"] for o in seen.outputs]
    assert [r for o in got.outputs for r in o["rows"]] == rows
    assert all(len(o["rows"]) == microbatches for o in got.outputs)


def test_checkpoints_are_plain_and_a_resumed_run_goes_on_with_the_same_masks(tmp_path):
    make = partial(made, dropout=0.4, optimizer="adam")
    whole = fit_exact(2, make)
    fit_exact(2, make, more={"max_epochs": 1}, saved=tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    plain = fit(made(dropout=0.4, optimizer="adam"), train=loader(ROWS), val=loader(16))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    assert state.keys() == torch.load(tmp_path / "plain.ckpt", weights_only=True).keys()
    again = fit_exact(2, make, ckpt_path=tmp_path / "half.ckpt")
    for rank in range(2):
        assert different(again[rank]["weights"], whole[rank]["weights"]) == []
        assert again[rank]["step"] == whole[rank]["step"]
        assert not any("estimators" in said for said in again[rank]["warnings"])
    fresh = fit_exact(2, make, more={"max_epochs": 1}, ckpt_path=None)
    assert different(fresh[0]["weights"], whole[0]["weights"]) != []


def resume_in_mid_epoch(rank, path):
    """The whole run, one that saves as it goes, and on from what it has saved; compared."""

    def go(seed=0, callbacks=(), ckpt_path=None):
        module = made(seed, dropout=0.3, batch_norm=True, optimizer="adam")
        options = {"max_epochs": 2, "use_distributed_sampler": False, "val_check_interval": 4}
        trainer = quiet_trainer(strategy(), devices=2, callbacks=list(callbacks), **options)
        torch.manual_seed(0)
        trainer.fit(module, Shuffled(), loader(16), ckpt_path=ckpt_path)
        return weights(module)

    save = AtBatchEnd(lambda trainer, *_: trainer.global_step == 5 and trainer.save_checkpoint(path))
    whole = go()
    return different(go(callbacks=[save]), whole), different(go(seed=5, ckpt_path=path), whole)


def test_a_run_resumed_in_mid_epoch_is_the_uninterrupted_one(tmp_path):
    found = in_turn(2, {"mid-epoch": partial(resume_in_mid_epoch, path=tmp_path / "mid.ckpt")})
    assert found["mid-epoch"] == 2 * [([], [])]
    assert torch.load(tmp_path / "mid.ckpt", weights_only=True)["global_step"] == 5


def test_checkpoints_of_other_strategies_are_resumed_from(tmp_path):
    """One with estimators, which are of no use here; the weights and the optimizer go on."""
    first = fit(made(optimizer="adam"), dni(), train=loader(ROWS), val=loader(16))
    first.save_checkpoint(tmp_path / "dni.ckpt")
    assert "lightning_dni" in torch.load(tmp_path / "dni.ckpt", weights_only=True)
    make = partial(made, optimizer="adam")
    found = fit_exact(2, make, ckpt_path=tmp_path / "dni.ckpt", saved=tmp_path / "exact.ckpt")
    module = made(optimizer="adam")
    fit_plain(module, ckpt_path=_counted_in_microbatches(tmp_path / "dni.ckpt"))
    assert different(found[1]["weights"], weights(module)) == []
    assert not any("estimators" in said for said in found[0]["warnings"])
    assert "lightning_dni" not in torch.load(tmp_path / "exact.ckpt", weights_only=True)


def _counted_in_microbatches(path):
    """The same checkpoint, as a Trainer with twice as many batches would have written it."""
    state = torch.load(path, weights_only=True)
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update({name: 2 * count for name, count in counts.items()})
    torch.save(state, path.with_name("counted.ckpt"))
    return path.with_name("counted.ckpt")


def evaluate_stage(rank):
    warnings.simplefilter("ignore")
    trainer = quiet_trainer(strategy(3), devices=3, use_distributed_sampler=False)
    module = net()
    return trainer.test(module, loader(20), verbose=False), trainer.predict(module, loader(20))


def test_tests_and_predictions_take_whole_batches():
    """Also a last batch of fewer rows than microbatches."""
    tested, predicted = on_ranks(evaluate_stage, world_size=3, grouped=False, seconds=120)[0]
    module = net()
    trainer = quiet_trainer()
    assert trainer.test(module, loader(20), verbose=False) == tested
    for one, other in zip(predicted, trainer.predict(module, loader(20)), strict=True):
        assert torch.equal(one, other)


class Configured(Net):
    """Brings options for synthetic gradients, of which an exact schedule takes the boundaries."""

    def configure_dni(self):
        return {"boundaries": STAGES[2], "estimator": LINEAR, "bp_lambda": 0.5, "labels": 1}


def fit_others(rank):
    """Fits that need no result of one another, in the same processes."""
    warnings.simplefilter("ignore")
    options = {"devices": 2, "use_distributed_sampler": False}
    trainer = quiet_trainer(strategy(boundaries=None), **options)
    trainer.fit(made(kind=Configured), loader(16))
    said = [trainer.strategy.engine.describe()["schedule"], trainer.strategy.engine.boundaries]
    callbacks = [BPLambdaScheduler(LinearWarmup(3))]
    with pytest.raises(MisconfigurationException) as refused:
        quiet_trainer(strategy(), callbacks=callbacks, **options).fit(net(), loader(16))
    return [*said, str(refused.value)]


def test_boundaries_of_the_module_are_taken_and_schedules_of_lambda_refused():
    for schedule, boundaries, said in on_ranks(fit_others, grouped=False, seconds=200):
        assert (schedule, boundaries) == ("1f1b", tuple(STAGES[2]))
        assert said.startswith("Expected synthetic gradients for BPLambdaScheduler, but got DNIPipeline")
        assert "Pass schedule='dni'" in said


class NoLoss(Logs):
    """Skips a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx else loss


class OwnBackward(Net):
    """Differentiates the loss itself."""

    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (NoLoss, r"Expected `training_step` to return a loss, .* for every microbatch, but got NoneType"),
        (
            OwnBackward,
            r"Expected Lightning's own `backward` under an exact schedule, but OwnBackward has one",
        ),
    ],
)
def test_what_cannot_be_run_on_microbatches_is_refused(kind, match):
    with pytest.raises(ReplicaError, match=match):
        fit_exact(2, partial(made, kind=kind))


# ---- options


def test_an_unknown_schedule_is_refused():
    with (
        unchecked(),
        pytest.raises(MisconfigurationException, match="'dni', '1f1b' or 'gpipe', but got 'zb'"),
    ):
        strategy(schedule="zb")


@pytest.mark.parametrize("number", [0, True, 2.5])
def test_what_is_no_number_of_microbatches_is_refused(number):
    with unchecked(), pytest.raises(MisconfigurationException, match="`microbatches` to be an integer"):
        strategy(microbatches=number)


def test_microbatches_of_synthetic_gradients_are_refused():
    with pytest.raises(MisconfigurationException, match=r"only, but got 4 with schedule='dni'"):
        strategy(schedule="dni", microbatches=4, estimator=LINEAR)
    assert strategy(schedule="dni", microbatches=1, estimator=LINEAR) is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"estimator": LINEAR}, r"\['estimator'\]"),
        ({"bp_lambda": 1.0, "staleness": 0}, r"\['bp_lambda', 'staleness'\]"),
        ({"labels": 1}, r"\['labels'\]"),
        ({"boundaries": None, "estimator_steps": 2}, r"\['estimator_steps'\]"),
    ],
)
def test_options_of_synthetic_gradients_are_refused_by_name(options, said):
    with pytest.raises(MisconfigurationException, match=rf"schedule='1f1b', but got {said}. Leave them out"):
        strategy(**options)


def test_boundaries_are_needed_from_somewhere():
    with pytest.raises(MisconfigurationException, match=r"Expected boundaries for Net, but got none"):
        strategy(boundaries=None).describe(net())


def test_the_table_says_that_gradients_are_exact(capsys):
    strategy(3).describe(net())
    said = capsys.readouterr().out
    assert "Net under exact gradients" in said
    assert said.count("none (exact)") == 2
