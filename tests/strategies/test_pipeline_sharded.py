"""Sharded checkpoints: every stage writes its own part, and together they are the ordinary one."""

import shutil
import time
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import torch.distributed as dist
from fits import different, dni, fit, loader, weights
from lightning.pytorch.plugins.io import TorchCheckpointIO
from processes import on_ranks
from strategies.pipelined import in_turn, once
from strategies.restarts import ALIGNED, CRITIC, Start, annealed, keep_all, run, said
from strategies.resuming import Shuffled, assert_same_state, state_of
from strategies.test_pipeline_checkpoints import assert_same_leaves
from torch.distributed.checkpoint import FileSystemReader

from lightning_dni import DNIPipelineStrategy
from lightning_dni.estimators import FeedbackAlignmentEstimator
from lightning_dni.strategies import consolidate
from lightning_dni.strategies._compat import MisconfigurationException
from lightning_dni.strategies.sharding import join_outlines, split_off, write_shards

SHARDED = {**CRITIC, "save_sharded": True}
STAGES = 3


@cache
def folder():
    """Made before processes are forked, which then share it."""
    return Path(mkdtemp())


def save_and_go_on(rank, options=CRITIC, name=""):
    """The run with ordinary checkpoints, with shards, and on from shards in mid-epoch and later.

    Under another seed, of which other matrices of feedback alignment would come.
    """
    shards, of = {**options, "save_sharded": True}, partial(keep_all, folder())
    keep = {"enable_checkpointing": True}
    whole = state_of(run(annealed(), options, callbacks=[of(f"{name}whole-")], **keep))
    sharded = run(annealed(), shards, callbacks=[of(f"{name}shards-")], **keep)
    held = {"alone": weights(sharded.lightning_module)}
    paths = [folder() / f"{name}shards-step={step}.ckpt" for step in (5, 10)]
    resumed = [state_of(run(annealed(seed=5), shards, ckpt_path=path, seed=9)) for path in paths]
    unsharded = state_of(run(annealed(seed=5), options, ckpt_path=paths[0], seed=9))
    if rank == 0:  # the others have their own part only
        for state in (state_of(sharded), *resumed):
            assert_same_state(state, whole)
    assert_same_state(unsharded, whole)
    return held


def save_outside_of_a_fit(rank):
    """Twice to one place, also once before the first batch."""

    class SaveFirst(Start):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(folder() / "first.ckpt")

    whole = state_of(run(annealed(), CRITIC, loader()))
    half = run(annealed(), SHARDED, loader(), max_epochs=1, callbacks=[SaveFirst()])
    for name in ("after.ckpt", "after.ckpt"):
        half.save_checkpoint(folder() / name)
    half.save_checkpoint(folder() / "light.ckpt", weights_only=True)
    for name in ("first", "after"):
        resumed = run(annealed(seed=5), SHARDED, loader(), ckpt_path=folder() / f"{name}.ckpt")
        if rank == 0:
            assert_same_state(state_of(resumed), whole)
    return True


@once
def three():
    folder()
    aligned = partial(save_and_go_on, options=ALIGNED, name="aligned-")
    return in_turn(STAGES, {"on": save_and_go_on, "outside": save_outside_of_a_fit, "aligned": aligned})


def test_a_run_with_shards_and_runs_resumed_from_them_are_the_ordinary_run():
    three()


def test_rank_zero_alone_ends_with_the_whole_module():
    last, *others = (rank["alone"] for rank in three()["on"])
    for other in others:
        assert different(last, other)


def test_every_stage_writes_its_own_tensors_into_one_file():
    three()
    path = folder() / "shards-step=5.ckpt"
    assert len(list(path.glob("*.distcp"))) == STAGES
    places = FileSystemReader(path).read_metadata().storage_data
    stages = {}
    for index, place in places.items():
        stages.setdefault(place.relative_path, set()).add(index.fqn.split(":")[0])
    assert sorted(map(sorted, stages.values())) == [["stage 0"], ["stage 1"], ["stage 2"]]
    assert any("exp_avg" in index.fqn for index in places)


@pytest.mark.parametrize("step", [5, 10, 20])
@pytest.mark.parametrize("name", ["", "aligned-"], ids=["critic", "feedback alignment"])
def test_consolidated_shards_are_the_ordinary_checkpoint(name, step):
    three()
    ours = consolidate(folder() / f"{name}shards-step={step}.ckpt", weights_only=True)
    whole = torch.load(folder() / f"{name}whole-step={step}.ckpt", weights_only=True)
    paths = {"callbacks"}  # where the checkpoints are
    assert list(ours) == list(whole)
    assert list(ours["state_dict"]) == list(whole["state_dict"])
    for key in set(whole) - paths:
        assert_same_leaves(ours[key], whole[key])


def test_a_consolidated_checkpoint_loads_without_us():
    three()
    torch.save(consolidate(folder() / "shards-step=5.ckpt"), folder() / "one.ckpt")
    start = Start()
    trainer = fit(
        annealed(seed=5), "auto", Shuffled(), ckpt_path=folder() / "one.ckpt", max_epochs=2, callbacks=[start]
    )
    assert trainer.global_step == 20


def test_the_weights_alone_and_saving_again():
    three()
    light = consolidate(folder() / "light.ckpt", weights_only=True)
    assert "optimizer_states" not in light
    assert not {"optimizers", "schedules"} & set(light["lightning_dni"])
    again = consolidate(folder() / "after.ckpt", weights_only=True)
    assert different(again["state_dict"], light["state_dict"]) == []
    assert not list(folder().glob("*.old"))
    assert not list(folder().glob("*.part"))


def test_one_process_goes_on_from_shards():
    three()
    start = Start()
    with pytest.warns(UserWarning, match="gone on with") as caught:
        fit(
            annealed(seed=5),
            dni(rng="stage", estimator=CRITIC["estimator"]),
            Shuffled(),
            ckpt_path=folder() / "shards-step=5.ckpt",
            max_epochs=2,
            callbacks=[start],
        )
    assert "target gradients under way" in said(caught)[0]
    saved = torch.load(folder() / "whole-step=5.ckpt", weights_only=True)
    assert different(start.weights, saved["state_dict"]) == []


def test_one_process_goes_on_from_shards_with_the_matrices_of_feedback_alignment(recwarn):
    three()
    one = partial(dni, rng="stage", estimator=FeedbackAlignmentEstimator)
    whole, resumed = annealed(), annealed(seed=5)
    fit(whole, one(), Shuffled(), max_epochs=2)
    path = folder() / "aligned-shards-step=5.ckpt"
    fit(resumed, one(), Shuffled(), ckpt_path=path, max_epochs=2, seed=9)
    assert different(weights(whole), weights(resumed)) == []
    assert not said(recwarn)


def copies(rank):
    options = {**SHARDED, "boundaries": ["net.1"]}
    trainer = run(annealed(), options, stages=4, max_epochs=1)
    trainer.save_checkpoint(folder() / "copies.ckpt")
    return weights(trainer.lightning_module)


def test_one_copy_of_a_pipeline_writes_and_others_only_what_is_under_way_in_them():
    folder()
    first, *_ = in_turn(4, {"copies": copies})["copies"]
    path = folder() / "copies.ckpt"
    assert different(consolidate(path)["state_dict"], first) == []
    names = [index.fqn for index in FileSystemReader(path).read_metadata().storage_data]
    assert {name.split(":")[0] for name in names} == {"stage 0", "stage 1", "stage 0 copy 1"}
    assert all("['pending']" in name for name in names if "copy" in name)


def crowd_in(rank, path):
    """Rank 0 is slow to make room, and finds what others have made meanwhile."""
    if rank == 0:
        remove = shutil.rmtree

        def removes_late(folder, **options):
            if folder.name.endswith(".part"):
                time.sleep(0.5)
                assert not folder.exists()
            remove(folder, **options)

        shutil.rmtree = removes_late
    write_shards(
        {f"stage {rank}: w": torch.full((3,), rank)},
        {} if rank == 0 else None,
        path,
        together=lambda collective, what: collective(),
        barrier=dist.barrier,
    )


def test_no_stage_makes_the_folder_while_another_removes_the_last_one(tmp_path):
    on_ranks(crowd_in, tmp_path / "kept.ckpt", world_size=3)


def write_alone(tensors, outline, path, together=lambda collective, what: collective()):
    write_shards(tensors, outline, path, together, barrier=lambda: None)


def test_the_old_checkpoint_survives_when_a_stage_stops_while_saving(tmp_path):
    def stops(collective, what):
        raise RuntimeError("a stage has stopped")

    path = tmp_path / "kept.ckpt"
    write = partial(write_alone, {"w": torch.ones(3)}, path=path, outline={"state_dict": {}})
    write()
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(RuntimeError, match="has stopped"):
        write(together=stops)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == before


TOLD = "stage 1: ['state_dict']['w']"


def test_texts_that_look_like_names_of_tensors_stay_texts(tmp_path):
    saved = {
        "hyper_parameters": {"a": TOLD, "b": "text " + TOLD, "c": "stage 7"},
        "state_dict": {"w": torch.ones(3)},
    }
    outline, tensors = split_off(saved, 1)
    write_alone(tensors, outline, tmp_path / "x.ckpt")
    assert_same_leaves(consolidate(tmp_path / "x.ckpt"), saved)


def test_what_a_module_renames_when_it_saves_is_kept():
    named = [{"state_dict": {f"my.{name}": name}} for name in ("upper", "lower")]
    whole = join_outlines(named, ["lower", "upper"])
    assert whole["state_dict"] == {"my.lower": "lower", "my.upper": "upper"}


def test_a_link_to_another_checkpoint_gives_way(tmp_path):
    """As ModelCheckpoint(save_last="link") leaves it."""
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    write = partial(write_alone, {"w": torch.ones(3)})
    write(path=best, outline={"of": "best"})
    last.symlink_to(best.name)
    for name in ("once", "again"):
        write(path=last, outline={"of": name})
    assert [consolidate(path)["of"] for path in (best, last)] == ["best", "again"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_folder_that_no_pipeline_wrote_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"holds no 'outline.ckpt'"):
        consolidate(tmp_path)


def test_what_shards_do_not_go_with_is_refused():
    with pytest.raises(MisconfigurationException, match="no `checkpoint_io` with save_sharded=True"):
        DNIPipelineStrategy(save_sharded=True, checkpoint_io=TorchCheckpointIO())


def far_away(rank):
    with pytest.raises(MisconfigurationException, match=r"'s3://bucket/x.ckpt', which is no path"):
        run(annealed(), SHARDED, stages=STAGES, max_epochs=1).save_checkpoint("s3://bucket/x.ckpt")
    return True


def test_remote_file_systems_are_refused():
    assert in_turn(STAGES, {"far": far_away})["far"] == [True] * STAGES
