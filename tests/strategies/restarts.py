"""Runs of pipelines that save, stop and go on, in the processes in which they happen."""

import warnings
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import lightning.pytorch as pl
import torch
from core.nets import VECTOR_ESTIMATORS
from fits import CLASSES, LINEAR, dni, fit, loader, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from strategies.pipelined import in_turn, once, pipeline
from strategies.resuming import Annealed, NoisyEstimator, Shuffled, assert_same_state, state_of

from lightning_dni.estimators import CriticCascade, DelayedGradientEstimator, FeedbackAlignmentEstimator

STAGES = 3
MODULE = {"dropout": 0.3, "batch_norm": True}
KINDS = {
    "momentum": ({"staleness": 2}, {"optimizer": "sgd"}, {}),
    "adam": ({"staleness": 2}, {"optimizer": "adam"}, {}),
    "no lag": ({"staleness": 0}, {"optimizer": "adam"}, {}),
    "accumulation": ({"staleness": 2}, {"optimizer": "adam"}, {"accumulate_grad_batches": 3}),
    "lagged norm": (
        {"staleness": 1, "clip_norm": "lagged"},
        {"optimizer": "adam"},
        {"gradient_clip_val": 0.1},
    ),
    "critic": ({"staleness": 2, "estimator": VECTOR_ESTIMATORS["critic"]}, {}, {}),
    "critic, no lag": ({"staleness": 0, "estimator": VECTOR_ESTIMATORS["critic"]}, {}, {}),
    "cascade": ({"staleness": 2, "estimator": partial(CriticCascade, num_classes=CLASSES)}, {}, {}),
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
COPIES = {"boundaries": ["net.0"]}
"""Two stages; with four processes there are two copies of them."""
KINDS_OF_COPIES = {
    "momentum": ({**COPIES, "staleness": 2}, {"optimizer": "sgd"}, {}),
    "accumulation": ({**COPIES, "staleness": 1}, {"optimizer": "adam"}, {"accumulate_grad_batches": 3}),
    "critic": (
        {**COPIES, "staleness": 2, "estimator": VECTOR_ESTIMATORS["critic"]},
        {"optimizer": "adam"},
        {},
    ),
    "sharded": ({**COPIES, "staleness": 2, "save_sharded": True}, {"optimizer": "adam"}, {}),
}
DELAYED = {"staleness": 2, "estimator": partial(DelayedGradientEstimator, delay=2)}
ALIGNED = {"staleness": 0, "estimator": FeedbackAlignmentEstimator}
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


def resume_copies(rank, folder, kind):
    """The same for two copies of two stages, each of which reads its own half of every batch."""
    options, of_module, of_trainer = KINDS_OF_COPIES[kind]
    whole_options = {key: value for key, value in options.items() if key != "save_sharded"}
    go = partial(run, stages=4, **of_trainer)
    name, every = f"copies-{kind}-", 2 if of_trainer else 5
    whole = state_of(go(annealed(**of_module), whole_options, half(rank)))
    keep = {"callbacks": [keep_all(folder, name, every)], "enable_checkpointing": True}
    saving = state_of(go(annealed(**of_module), options, half(rank), **keep))
    if rank == 0 or options is whole_options:  # with shards rank 0 alone has the whole module
        assert_same_state(saving, whole)
    for step in (every, 2 * every):
        path = folder / f"{name}step={step}.ckpt"
        resumed = go(annealed(seed=5, **of_module), whole_options, half(rank), ckpt_path=path)
        assert_same_state(state_of(resumed), whole)
    return len(whole)


def half(rank):
    """What a copy reads."""
    return Shuffled(share=(rank % 2, 2))


def forget_other_copies(rank, folder, **trainer):
    """On with what a single copy, or an older version, has saved: what is said, and where it begins."""
    checkpoint = torch.load(folder / "copies-momentum-step=5.ckpt", weights_only=True)
    checkpoint["lightning_dni"]["pipeline"].pop("copies")
    path = folder / f"single-{rank}.ckpt"
    torch.save(checkpoint, path)
    options, of_module, _ = KINDS_OF_COPIES["momentum"]
    return resume_another(rank, folder, path, options, stages=4, train=half(rank), **of_module)


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


def save_while_gradients_are_delayed(rank, folder):
    """Saving and validating disturb nothing; whether it was so."""
    bare = state_of(run(annealed(), DELAYED))
    keep = keep_all(folder, "delayed-")
    whole = run(
        annealed(), DELAYED, val=loader(16), val_check_interval=4, callbacks=[keep], enable_checkpointing=True
    )
    assert_same_state(state_of(whole), bare)
    return len(bare)


def resume_another(rank, folder, path, options, stages=STAGES, train=None, **of_module):
    """What is said when a checkpoint of somebody else's is resumed, where it begins, and how it ends."""
    start = Start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = annealed(seed=5, **of_module)
        run(module, options, train, stages=stages, ckpt_path=folder / path, callbacks=[start])
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
    aligned = dni(rng="stage", estimator=FeedbackAlignmentEstimator)
    one(annealed(), aligned, train=Shuffled(), callbacks=[keep("aligned-one-")], seed=9)
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
        "write alignment": partial(write, folder=folder(), name="aligned-", options=ALIGNED),
        "from alignment": partial(another, path="aligned-one-step=5.ckpt", options=ALIGNED),
        "from one": partial(another, path="one-step=5.ckpt", options={"staleness": 0}),
        "from plain": partial(
            another, path="plain-step=5.ckpt", options={"staleness": 0, "bp_lambda": 1.0}, dropout=0.0
        ),
        "delayed": partial(save_while_gradients_are_delayed, folder=folder()),
        "delayed again": partial(another, path="delayed-step=5.ckpt", options=DELAYED),
        "another lag": partial(another, path="two-step=5.ckpt", options={**CRITIC, "staleness": 1}),
    }
    return in_turn(STAGES, scenes)


@once
def four():
    """All that two copies of two stages do."""
    scenes = {kind: partial(resume_copies, folder=folder(), kind=kind) for kind in KINDS_OF_COPIES}
    return in_turn(4, scenes | {"from one copy": partial(forget_other_copies, folder=folder())})


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


@once
def one_copy():
    """What two processes make of what two copies have saved."""
    four()
    options, of_module, _ = KINDS_OF_COPIES["momentum"]
    path = "copies-momentum-step=5.ckpt"
    resume = partial(resume_another, folder=folder(), path=path, options=options, stages=2, **of_module)
    return in_turn(2, {"from copies": resume})
