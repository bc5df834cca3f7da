"""Boundaries that the pipeline chooses: a fit with them is the fit in which they are named."""

import logging

import pytest
import torch
from fits import LINEAR, Net, dataset, different, fit, loader, net, weights
from lightning_utilities.core import rank_zero
from processes import ReplicaError
from strategies.restarts import ALIGNED
from strategies.resuming import Shuffled
from strategies.staged_fits import fit_staged, on_stages, staged, staged_trainer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_dni import DNIDDPStrategy, DNIPipelineStrategy, DNIStrategy
from lightning_dni.estimators import FeedbackAlignmentEstimator
from lightning_dni.strategies._compat import MisconfigurationException
from lightning_dni.strategies.sampling import one_batch


def auto(**options):
    return DNIPipelineStrategy(**{"boundaries": "auto", "estimator": LINEAR, **options})


def listen():
    """What is said to the user from now on."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    rank_zero.log.addHandler(handler)
    return told


def fit_one(rank, stages, options, fit):
    told, module = listen(), net(dropout=0.2)
    strategy = DNIPipelineStrategy(**options)
    trainer = fit_staged(
        stages, module, train=loader(shuffle=True), strategy=strategy, **{"max_epochs": 2, **fit}
    )
    return {
        "weights": weights(module),
        "boundaries": list(strategy.engine.plan.boundaries),
        "estimators": {n: weights(e) for n, e in strategy.engine.estimators.items()},
        "told": [text for text in told if "boundaries=" in text],
        "loss": trainer.callback_metrics["loss"].item(),
    }


DNI = {"estimator": LINEAR}
EXACT = {"schedule": "1f1b", "microbatches": 2}


@pytest.mark.parametrize(
    ("stages", "options"),
    [(2, DNI), (3, DNI), (2, EXACT), (3, ALIGNED)],
    ids=["2", "3", "1f1b", "feedback alignment"],
)
def test_a_fit_with_chosen_boundaries_is_the_fit_in_which_they_are_named(stages, options):
    found = on_stages(fit_one, stages, {"boundaries": "auto", **options}, {}, stages=stages, seconds=120)
    boundaries = found[0]["boundaries"]
    assert len(boundaries) == stages - 1
    named = on_stages(fit_one, stages, {"boundaries": boundaries, **options}, {}, stages=stages, seconds=120)
    start = weights(net(dropout=0.2))
    for one, other in zip(found, named, strict=True):
        assert one["boundaries"] == other["boundaries"] == boundaries
        assert different(one["weights"], other["weights"]) == []
        assert one["loss"] == other["loss"]
        assert len(different(one["weights"], start)) == len(start)
        for name in other["estimators"]:
            assert different(one["estimators"][name], other["estimators"][name]) == []
    assert f"has chosen {boundaries}" in found[0]["told"][0]
    assert [len(each["told"]) for each in found] == [1] + [0] * (stages - 1)
    assert [each["told"] for each in named] == [[]] * stages


def test_fewer_stages_than_processes_make_copies():
    found = on_stages(fit_one, 4, {"boundaries": "auto", "stages": 2, **DNI}, {}, stages=4, seconds=120)
    assert {len(each["boundaries"]) for each in found} == {1}
    assert all(different(each["weights"], found[0]["weights"]) == [] for each in found)


def resume(rank, path):
    module = net()
    first = fit_staged(2, module, strategy=staged(boundaries=["net.0.0"]), max_epochs=1)
    first.save_checkpoint(path)
    told, strategy = listen(), auto()
    fit_staged(2, net(), strategy=strategy, max_epochs=2, ckpt_path=path)
    again = strategy.engine.plan.boundaries
    strategy = auto(estimator={"net*": LINEAR})
    trainer = fit_staged(2, net(), strategy=strategy, max_epochs=1)
    trainer.validate(trainer.lightning_module, loader(), verbose=False)
    strategy.describe()
    return again, [t for t in told if "boundaries=" in t], strategy.engine.plan.boundaries


def test_a_fit_that_goes_on_has_the_boundaries_of_the_checkpoint(tmp_path):
    """They are ones that would not be chosen by themselves, as a plainer name is as good."""
    (again, told, fresh), (other, _, same) = on_stages(resume, str(tmp_path / "x.ckpt"), seconds=180)
    assert again == other == ("net.0.0",)
    assert told[0] == "boundaries='auto' has taken those of the checkpoint: ['net.0.0']."
    assert fresh == same
    assert f"has chosen {list(fresh)}" in told[1]


def align(rank, path):
    """With shards, and resumed under another seed, of which other matrices would come."""
    first = fit_staged(3, net(dropout=0.2), strategy=auto(**ALIGNED, save_sharded=True), max_epochs=1)
    first.save_checkpoint(path)
    strategy, resumed = auto(**ALIGNED), net(seed=5, dropout=0.2)
    trainer = staged_trainer(3, strategy, max_epochs=2)
    torch.manual_seed(9)
    trainer.fit(resumed, loader(), ckpt_path=path)
    found = strategy.engine.describe()["feedback_alignment"]
    return weights(resumed), list(strategy.engine.plan.boundaries), found


def test_feedback_alignment_with_chosen_boundaries_is_one_process_and_goes_on(tmp_path):
    found = on_stages(align, str(tmp_path / "x.ckpt"), stages=3, seconds=120)
    module, boundaries = net(dropout=0.2), found[0][1]
    one = DNIStrategy(boundaries=boundaries, estimator=FeedbackAlignmentEstimator, rng="stage")
    fit(module, one, max_epochs=2)
    for resumed, chosen, _ in found:
        assert chosen == boundaries
        assert different(resumed, weights(module)) == []
    assert found[0][2] == one.engine.describe()["feedback_alignment"]


# ---- what cannot be done


def named(boundaries):
    module = net()
    module.configure_dni = lambda: {"boundaries": boundaries, "estimator": LINEAR}
    return module


@pytest.mark.parametrize("strategy", [DNIStrategy, DNIDDPStrategy])
def test_only_a_pipeline_chooses_boundaries(strategy):
    says = rf"Expected `boundaries` to be names.*strategy='{strategy.strategy_name}', but got 'auto'"
    with pytest.raises(MisconfigurationException, match=says):
        strategy().describe(named("auto"))


def test_boundaries_are_not_known_before_a_fit():
    with pytest.raises(MisconfigurationException, match=r"'auto' are only chosen when `fit` begins. Call"):
        DNIPipelineStrategy().describe(named("auto"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"boundaries": "auto"}, r"Expected at least 2 stages with boundaries='auto', but got 1 for 1"),
        ({"boundaries": "auto", "stages": 2}, r"that `stages` divides, but got stages=2 and 1 processes"),
        ({"boundaries": ["net.0"], "stages": 3}, r"Expected `stages` to be 2, one more than .*but got 3"),
    ],
    ids=["alone", "not a divisor", "other number"],
)
def test_a_number_of_stages_that_does_not_fit_is_refused(options, says):
    def body(rank):
        fit_staged(1, strategy=DNIPipelineStrategy(**options, estimator=LINEAR))

    with pytest.raises(ReplicaError, match=says):
        on_stages(body, stages=1)


class Fails(Net):
    def on_train_start(self):
        self.share = 0.5

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.share


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


@pytest.mark.parametrize(
    ("make", "data", "says"),
    [
        (Fails, loader, r"Expected `training_step` to run on a first batch.*has no attribute 'share' Name"),
        (net, lambda: DataLoader(Stream(), 8), r"beforehand.*got a Stream, an iterable data set. Name"),
        (lambda: net(width=3).requires_grad_(False), loader, r"return a loss that can be differentiated"),
    ],
    ids=["step", "data", "loss"],
)
def test_what_goes_wrong_is_said_on_every_rank(make, data, says):
    def body(rank):
        with pytest.raises(MisconfigurationException, match=says):
            fit_staged(2, make(), train=data(), strategy=auto())
        return True

    assert on_stages(body) == [True, True]


# ---- one batch of the data


def test_a_batch_is_what_the_loader_gives_and_leaves_nothing_behind():
    generator = torch.Generator().manual_seed(3)
    train = DataLoader(dataset(), 4, shuffle=True, generator=generator)
    state = generator.get_state()
    found = one_batch(train)
    assert torch.equal(generator.get_state(), state)
    expected = train.collate_fn([dataset()[i] for i in next(iter(train.batch_sampler))])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_users_own_sampler_stays_where_it_is():
    class Moving(RandomSampler):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            return iter([self.epoch, self.epoch + 1])

    sampler = Moving(dataset())
    found = one_batch(DataLoader(dataset(), 2, sampler=sampler))
    assert torch.equal(found[0], torch.stack([dataset()[i][0] for i in (1, 2)]))
    assert sampler.epoch == 0


def test_a_users_own_loader_stays_where_it_is():
    train = Shuffled()
    found = one_batch([train, loader()])
    assert (train.epoch, train.position) == (0, 0)
    expected = next(iter(train))
    assert torch.equal(found[0][0], expected[0])
    assert torch.equal(found[0][1], expected[1])


def test_several_loaders_give_what_a_trainer_makes_of_them():
    found = one_batch({"a": loader(), "b": [loader(batch_size=2), [torch.zeros(1)]]})
    assert found["a"][0].shape == (8, 6)
    assert found["b"][0][0].shape == (2, 6)
    assert found["b"][1][0].item() == 0.0


def test_rows_that_nobody_batches_come_as_they_are():
    found = one_batch(DataLoader([{"x": 1.0}, {"x": 2.0}], batch_size=None))
    assert found == {"x": 1.0}


def test_what_is_read_once_is_refused():
    with pytest.raises(MisconfigurationException, match="got a generator, which can be iterated once"):
        one_batch(x for x in [1, 2])
    with pytest.raises(MisconfigurationException, match="got a list_iterator, which can be iterated once"):
        one_batch(iter([1, 2]))
    with pytest.raises(MisconfigurationException, match="with boundaries='auto', but got no batch"):
        one_batch(DataLoader([]))
