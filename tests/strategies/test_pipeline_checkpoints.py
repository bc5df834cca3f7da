"""Checkpoints of a pipeline: in form and content those of one process, and a resumed run is the whole one."""

import warnings
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import lightning.pytorch as pl
import pytest
import torch
from core.nets import VECTOR_ESTIMATORS
from fits import LINEAR, different, dni, fit, loader, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from strategies.pipelined import in_turn, once, pipeline
from strategies.resuming import Annealed, NoisyEstimator, Shuffled, assert_same_state, leaves, state_of

STAGES = 3
MODULE = {"dropout": 0.3, "batch_norm": True}
KINDS = {
    "momentum": ({"staleness": 2}, {"optimizer": "sgd"}, {}),
    "adam": ({"staleness": 2}, {"optimizer": "adam"}, {}),
    "no lag": ({"staleness": 0}, {"optimizer": "adam"}, {}),
    "accumulation": ({"staleness": 2}, {"optimizer": "adam"}, {"accumulate_grad_batches": 3}),
    "critic": ({"staleness": 2, "estimator": VECTOR_ESTIMATORS["critic"]}, {}, {}),
    "critic, no lag": ({"staleness": 0, "estimator": VECTOR_ESTIMATORS["critic"]}, {}, {}),
    "noisy": ({"staleness": 0, "estimator": NoisyEstimator}, {}, {}),
    "mixed": ({"staleness": 0, "bp_lambda": 0.5}, {}, {}),
    "several": (
        {
            "staleness": 1,
            "estimator_steps": 2,
            "estimator_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
            "estimator_optimizer": {"net.0": torch.optim.Adam, "*": partial(torch.optim.SGD, lr=0.01)},
        },
        {},
        {},
    ),
}
CRITIC = {"staleness": 2, "estimator": VECTOR_ESTIMATORS["critic"]}


def annealed(seed=0, **options):
    torch.manual_seed(seed)
    return Annealed(**{**MODULE, **options})


def keep_all(folder, name="", every=5):
    return ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_train_steps=every, filename=name + "{step}")


def run(module, options, train=None, val=None, stages=STAGES, ckpt_path=None, **trainer):
    """A fit as one stage."""
    devices = {"devices": stages, "use_distributed_sampler": False, "max_epochs": 2}
    made = pipeline(stages, **options)
    return fit(module, made, Shuffled() if train is None else train, val, ckpt_path, **{**devices, **trainer})


class Start(pl.Callback):
    """The module's weights when training begins."""

    def on_train_start(self, trainer, module):
        self.weights = weights(module)


def said(caught):
    return [str(w.message) for w in caught if "gone on with" in str(w.message)]


# ---- what the processes do; each returns what the tests below look at


def resume_everywhere(rank, folder, kind):
    """The whole run, alone and disturbed, and what is left of it after each resume."""
    options, of_module, of_trainer = KINDS[kind]
    name, every = f"{kind}-", 2 if of_trainer else 5
    bare = state_of(run(annealed(**of_module), options, **of_trainer))
    disturbed = run(
        annealed(**of_module),
        options,
        val=loader(16),
        val_check_interval=4,
        log_every_n_steps=2,
        callbacks=[keep_all(folder, name, every)],
        enable_checkpointing=True,
        **of_trainer,
    )
    assert_same_state(state_of(disturbed), bare)
    last = disturbed.global_step
    for step in (every, 2 * every):  # in mid-epoch, and at its end
        path = folder / f"{name}step={step}.ckpt"
        resumed = run(annealed(seed=5, **of_module), options, ckpt_path=path, **of_trainer)
        assert resumed.global_step == last
        assert_same_state(state_of(resumed), bare)
    return len(bare)


def forget_what_is_pending(rank, folder):
    """Guard: the comparison above finds what a checkpoint lacks."""
    options, _, _ = KINDS["momentum"]
    whole = state_of(run(annealed(optimizer="sgd"), options))
    checkpoint = torch.load(folder / "momentum-step=10.ckpt", weights_only=True)
    pending = checkpoint["lightning_dni"]["pipeline"]["pending"]
    assert [len(each) for each in pending.values()] == [2, 2]
    checkpoint["lightning_dni"]["pipeline"]["pending"] = {}
    path = folder / f"forgetful-{rank}.ckpt"
    torch.save(checkpoint, path)
    resumed = state_of(run(annealed(seed=5, optimizer="sgd"), options, ckpt_path=path))
    return len(whole) != len(resumed) or not all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(whole, resumed, strict=True)
    )


class Counted(TorchCheckpointIO):
    """Counts what is written by this process."""

    saves = 0

    def save_checkpoint(self, *args, **kwargs):
        self.saves += 1
        super().save_checkpoint(*args, **kwargs)


def keep_the_best(rank, folder):
    """Best and last; then on from either, in the same Trainer; and the weights alone."""
    keep = ModelCheckpoint(
        dirpath=folder, filename="best-{epoch}", monitor="val_loss", save_last=True, save_top_k=1
    )
    light = ModelCheckpoint(dirpath=folder, filename="light", save_weights_only=True)
    writer = Counted()
    module = annealed()
    options = {**CRITIC, "checkpoint_io": writer}
    trainer = run(module, options, loader(), loader(16), callbacks=[keep, light], enable_checkpointing=True)
    best = [trainer.validate(module, loader(16), ckpt_path=p, verbose=False)[0] for p in ("best", "last")]
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader(16), ckpt_path="last")
    whole = run(annealed(), CRITIC, loader(), max_epochs=3)
    assert_same_state(state_of(trainer), state_of(whole))
    return {"writes": writer.saves, "best": best if rank == 0 else None, "path": keep.best_model_path}


def save_outside_of_a_fit(rank, folder):
    """Before the first batch, also of a resumed run, and after the fit: all go on as the whole run."""

    class SaveFirst(pl.Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(folder / f"first-{trainer.global_step}.ckpt")

    whole = state_of(run(annealed(), CRITIC, loader()))
    half = run(annealed(), CRITIC, loader(), max_epochs=1, callbacks=[SaveFirst()])
    half.save_checkpoint(folder / "after.ckpt")
    for name in ("first-0", "after"):
        resumed = run(
            annealed(seed=5), CRITIC, loader(), ckpt_path=folder / f"{name}.ckpt", callbacks=[SaveFirst()]
        )
        assert_same_state(state_of(resumed), whole)
    resumed = run(annealed(seed=6), CRITIC, loader(), ckpt_path=folder / "first-10.ckpt")
    assert_same_state(state_of(resumed), whole)
    return True


def fit_twice(rank, folder, options):
    """A second fit on the same Trainer."""
    module, data = annealed(), partial(loader, rows=76)
    trainer = run(module, options, train=data(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    return {"weights": weights(module), "steps": trainer.strategy.engine.state_dict()["steps"]}


def write(rank, folder, name, options):
    """A checkpoint of the first epoch and one in mid-epoch."""
    run(annealed(), options, max_epochs=1, enable_checkpointing=True, callbacks=[keep_all(folder, name)])


def resume_another(rank, folder, path, options, stages=STAGES, **of_module):
    """What is said when a checkpoint of somebody else's is resumed, where it begins, and how it ends."""
    start = Start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = annealed(seed=5, **of_module)
        run(module, options, stages=stages, ckpt_path=folder / path, callbacks=[start])
    plain = [str(w.message) for w in caught if "holds no gradient estimators" in str(w.message)]
    return {"said": said(caught), "plain": plain, "start": start.weights, "weights": weights(module)}


@cache
def folder():
    return Path(mkdtemp())


@once
def three():
    """All that three processes do, and what one process does before that."""
    warnings.simplefilter("ignore")
    keep = partial(keep_all, folder())
    one = partial(fit, train=Shuffled(), max_epochs=1, enable_checkpointing=True)
    one(annealed(), dni(rng="stage"), callbacks=[keep("one-")])
    one(annealed(dropout=0.0), "auto", train=Shuffled(), callbacks=[keep("plain-")])
    scenes = {("resume", kind): partial(resume_everywhere, folder=folder(), kind=kind) for kind in KINDS}
    scenes |= {
        "forget": partial(forget_what_is_pending, folder=folder()),
        "best": partial(keep_the_best, folder=folder()),
        "outside": partial(save_outside_of_a_fit, folder=folder()),
        "twice 0": partial(fit_twice, folder=folder(), options={"staleness": 0}),
        "twice 2": partial(fit_twice, folder=folder(), options=CRITIC),
        "write 0": partial(write, folder=folder(), name="zero-", options={"staleness": 0}),
        "write 2": partial(write, folder=folder(), name="two-", options=CRITIC),
    }
    another = partial(resume_another, folder=folder())
    scenes |= {
        "from one": partial(another, path="one-step=5.ckpt", options={"staleness": 0}),
        "from plain": partial(
            another, path="plain-step=5.ckpt", options={"staleness": 0, "bp_lambda": 1.0}, dropout=0.0
        ),
        "another lag": partial(another, path="two-step=5.ckpt", options={**CRITIC, "staleness": 1}),
    }
    return in_turn(STAGES, scenes)


@once
def two():
    """What two processes make of what three, or one, have saved."""
    three()
    fewer = partial(resume_another, folder=folder(), stages=2)
    options = {**CRITIC, "boundaries": ["net.1"]}
    return in_turn(
        2,
        {
            "from three": partial(fewer, path="two-step=5.ckpt", options=options),
            "from one": partial(fewer, path="one-step=5.ckpt", options={**options, "estimator": LINEAR}),
            "other cut": partial(
                fewer, path="two-step=5.ckpt", options={**options, "boundaries": ["net.0.2"]}
            ),
        },
    )


def saved(name, step=5):
    return torch.load(folder() / f"{name}-step={step}.ckpt", weights_only=True)


# ---- a resumed run is the whole one


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_pipeline_is_the_uninterrupted_one_and_saving_and_validating_change_nothing(kind):
    """Compared in every process: its weights, estimators, optimizers, schedules and what is under way."""
    assert min(three()["resume", kind]) > 50


def test_the_test_above_can_fail():
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
