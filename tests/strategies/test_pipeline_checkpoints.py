"""Checkpoints of a pipeline: in form and content those of one process, and a resumed run is the whole one."""

from functools import partial

import pytest
import torch
from fits import different, dni, fit, loader, weights
from strategies.restarts import (
    CRITIC,
    KINDS,
    KINDS_OF_COPIES,
    STAGES,
    Start,
    annealed,
    folder,
    four,
    one_copy,
    said,
    three,
    two,
)
from strategies.resuming import Annealed, Shuffled, leaves

from lightning_dni.estimators import FeedbackAlignmentEstimator


def saved(name, step=5):
    return torch.load(folder() / f"{name}-step={step}.ckpt", weights_only=True)


# ---- a resumed run is the whole one


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_pipeline_is_the_uninterrupted_one_and_saving_and_validating_change_nothing(kind):
    """Compared in every process: its weights, estimators, optimizers, schedules and what is under way."""
    assert min(three()["resume", kind]) > 50


@pytest.mark.parametrize("kind", KINDS_OF_COPIES)
def test_resumed_copies_of_a_pipeline_are_the_uninterrupted_ones(kind):
    """In every process, each of which goes on from what was under way in its own copy."""
    assert min(four()[kind]) > 50


def test_the_first_test_above_can_fail():
    assert any(three()["forget"])


def test_best_and_last_are_found_and_rank_zero_alone_writes():
    best, *others = three()["best"]
    assert best["writes"] > 2
    assert [rank["writes"] for rank in others] == [0, 0]
    assert all("val_loss" in metrics for metrics in best["best"])
    assert {rank["path"] for rank in others} == {best["path"]}


def test_the_weights_alone_are_saved_without_optimizers():
    three()
    light = torch.load(folder() / "light.ckpt", weights_only=True)
    assert "optimizer_states" not in light
    assert not {"optimizers", "schedules"} & set(light["lightning_dni"])
    assert set(light["lightning_dni"]["estimators"]) == {"net.0", "net.1"}
    loaded = Annealed.load_from_checkpoint(folder() / "light.ckpt", strict=True)
    assert different(weights(loaded), light["state_dict"]) == []


def test_checkpoints_from_before_the_first_batch_and_from_after_a_fit_are_gone_on_with():
    assert three()["outside"] == [True] * STAGES


@pytest.mark.parametrize(("name", "options"), [("twice 0", {}), ("twice 2", None)])
def test_a_second_fit_goes_on_as_one_process_does(name, options):
    found = three()[name]
    assert {rank["steps"] for rank in found} == {20}
    for rank in found[1:]:
        assert different(rank["weights"], found[0]["weights"]) == []
    if options is not None:
        module, data = annealed(), partial(loader, rows=76)
        trainer = fit(module, dni(rng="stage", **options), data())
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data())
        assert different(weights(module), found[0]["weights"]) == []


# ---- form


def flat(value, at=""):
    """Every leaf by its place."""
    if isinstance(value, dict):
        return {place: leaf for k, v in value.items() for place, leaf in flat(v, f"{at}/{k}").items()}
    if isinstance(value, (list, tuple)):
        return {place: leaf for k, v in enumerate(value) for place, leaf in flat(v, f"{at}/{k}").items()}
    return {at: value}


def assert_same_leaves(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for place, leaf in one.items():
        same = torch.equal(leaf, other[place]) if isinstance(leaf, torch.Tensor) else leaf == other[place]
        assert same, place


@pytest.mark.parametrize("step", [5, 10], ids=["mid-epoch", "epoch end"])
def test_a_checkpoint_is_that_of_one_process(step):
    three()
    ours, theirs = saved("zero", step), saved("one", step)
    assert list(ours) == list(theirs)
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters", "loops", "epoch"):
        assert_same_leaves(ours[key], theirs[key])
    ours, theirs = ours["lightning_dni"], theirs["lightning_dni"]
    assert set(ours) - set(theirs) == {"pipeline"}
    assert set(theirs) <= set(ours)
    for key in set(theirs) - {"optimizers"}:
        assert_same_leaves(ours[key], theirs[key])
    # one process has one optimizer for all estimators
    moments = [
        [value for each in state["optimizers"] for value in each["state"].values()]
        for state in (ours, theirs)
    ]
    assert_same_leaves(*moments)
    assert len(moments[0]) > 2


def test_a_checkpoint_holds_tensors_and_primitives_and_loads_without_us():
    three()
    ours = saved("two")
    kinds = {type(leaf) for leaf in leaves(ours["lightning_dni"])}
    assert kinds <= {torch.Tensor, str, int, float, bool, type(None)}
    pending = ours["lightning_dni"]["pipeline"]["pending"]
    assert {name: len(each) for name, each in pending.items()} == {"net.0": 4, "net.1": 2}
    loaded = Annealed.load_from_checkpoint(folder() / "two-step=5.ckpt", strict=True, weights_only=True)
    assert different(weights(loaded), ours["state_dict"]) == []


# ---- from one strategy to another


def test_one_process_goes_on_bit_for_bit_where_nothing_is_under_way(recwarn):
    three()
    whole, module = annealed(), annealed(seed=5)
    fit(whole, dni(rng="stage"), Shuffled(), max_epochs=2)
    fit(module, dni(rng="stage"), Shuffled(), ckpt_path=folder() / "zero-step=5.ckpt", max_epochs=2)
    assert different(weights(whole), weights(module)) == []
    assert not said(recwarn)


def test_one_process_says_what_was_under_way():
    three()
    start = Start()
    with pytest.warns(UserWarning, match="gone on with") as caught:
        fit(
            annealed(seed=5),
            dni(rng="stage", estimator=CRITIC["estimator"]),
            Shuffled(),
            ckpt_path=folder() / "two-step=5.ckpt",
            max_epochs=2,
            callbacks=[start],
        )
    assert said(caught) == [
        "Not all that the checkpoint holds is gone on with: target gradients under way (4 at 'net.0', 2 at "
        "'net.1') are dropped: they were for boundaries ['net.0', 'net.1'] with staleness=2, here it is one "
        "process."
    ]
    assert different(start.weights, saved("two")["state_dict"]) == []


def test_plain_lightning_goes_on_with_the_weights():
    three()
    start = Start()
    trainer = fit(
        annealed(seed=5),
        "auto",
        Shuffled(),
        ckpt_path=folder() / "two-step=5.ckpt",
        max_epochs=2,
        callbacks=[start],
    )
    assert trainer.global_step == 20
    assert different(start.weights, saved("two")["state_dict"]) == []


def test_a_pipeline_goes_on_bit_for_bit_with_a_checkpoint_of_one_process():
    found = three()["from one"]
    whole = annealed()
    fit(whole, dni(rng="stage"), Shuffled(), max_epochs=2)
    for rank in found:
        assert different(rank["weights"], weights(whole)) == []
        assert not rank["said"]


def test_feedback_alignment_goes_on_with_its_matrices_from_one_strategy_to_the_other():
    """Resumed under another seed, of which other matrices would come."""
    found = three()["from alignment"]
    one = partial(dni, rng="stage", estimator=FeedbackAlignmentEstimator)
    first, second, resumed = annealed(), annealed(), annealed(seed=5)
    fit(first, one(), Shuffled(), max_epochs=2, seed=9)
    for rank in found:
        assert different(rank["weights"], weights(first)) == []
        assert not rank["said"]
    fit(second, one(), Shuffled(), max_epochs=2)
    fit(resumed, one(), Shuffled(), ckpt_path=folder() / "aligned-step=5.ckpt", max_epochs=2, seed=9)
    assert different(weights(second), weights(resumed)) == []
    assert different(weights(first), weights(second))
    ours, theirs = saved("aligned")["lightning_dni"], saved("aligned-one")["lightning_dni"]
    assert flat(ours["estimators"]).keys() == flat(theirs["estimators"]).keys()
    assert ours["estimators"] != theirs["estimators"]


def test_a_pipeline_goes_on_bit_for_bit_with_a_plain_checkpoint():
    """At lambda 1 the estimators, which start afresh, do not matter."""
    found = three()["from plain"]
    whole = annealed(dropout=0.0)
    fit(whole, "auto", Shuffled(), max_epochs=2)
    for rank in found:
        assert different(rank["weights"], weights(whole)) == []
    assert [len(rank["plain"]) for rank in found] == [1, 0, 0]


def test_another_lag_drops_what_is_under_way_and_says_so():
    first, *others = three()["another lag"]
    assert len(first["said"]) == 1
    assert "with staleness=2, here it is staleness=1" in first["said"][0]
    assert not any(rank["said"] for rank in others)
    assert different(first["start"], saved("two")["state_dict"]) == []


def test_delayed_gradients_under_way_are_dropped_and_that_is_said():
    assert min(three()["delayed"]) > 50
    first, *others = three()["delayed again"]
    assert first["said"] == [
        "Not all that the checkpoint holds is gone on with: delayed gradients under way (4 at 'net.0', 2 at "
        "'net.1') are dropped: they need graphs, which nobody saves."
    ]
    assert not any(rank["said"] for rank in others)
    for rank in (first, *others):
        assert different(rank["start"], saved("delayed")["state_dict"]) == []
        assert different(rank["weights"], first["weights"]) == []


def dropped(then, now):
    return (
        "Not all that the checkpoint holds is gone on with: target gradients under way (2 at 'net.0') are "
        f"dropped: they were for boundaries ['net.0'] with staleness=2{then}, here it is staleness=2{now}."
    )


def test_another_number_of_copies_drops_what_is_under_way_and_says_so():
    expected = {
        "from one copy": (four(), dropped("", " in 2 copies of the pipeline")),
        "from copies": (one_copy(), dropped(" in 2 copies of the pipeline", "")),
    }
    for name, (found, text) in expected.items():
        first, *others = found[name]
        assert first["said"] == [text]
        assert not any(rank["said"] for rank in others)
        for rank in (first, *others):
            assert different(rank["start"], saved("copies-momentum")["state_dict"]) == []
            assert different(rank["weights"], first["weights"]) == []


@pytest.mark.parametrize(
    ("name", "source", "clauses"),
    [
        (
            "from three",
            "two",
            ["estimators at ['net.0'] are dropped", "(4 at 'net.0', 2 at 'net.1') are dropped"],
        ),
        ("from one", "one", ["estimators at ['net.0'] are dropped", "optimizers start afresh"]),
        (
            "other cut",
            "two",
            ["estimators at ['net.0', 'net.1'] are dropped", "estimators at ['net.0.2'] start afresh"],
        ),
    ],
)
def test_fewer_stages_go_on_with_the_same_weights_and_say_what_is_dropped(name, source, clauses):
    first, second = two()[name]
    assert len(first["said"]) == 1
    assert not second["said"]
    assert all(clause in first["said"][0] for clause in clauses)
    for rank in (first, second):
        assert different(rank["start"], saved(source)["state_dict"]) == []
    assert different(first["weights"], second["weights"]) == []
    assert different(first["weights"], first["start"])
