"""Truncations in two real processes, each with sequences of its own: they do what one does on all of them."""

from contextlib import nullcontext
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from core.nets import assert_close, same_bits
from core.recurrent import BATCH, Net, begin_anew, draw_chunks, loss_of, stirred
from core.truncated_stage import chunks_of, train
from core.truncated_stage import stirred as stirred_below
from ddp_fits import state_of, trainers
from fits import AtBatchStart, BrokenError, different, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import TIMEOUT, on_ranks
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_dni import DNIDDPStrategy, DNIStrategy, GradientMonitor
from lightning_dni.core import DNIEngine
from lightning_dni.estimators import LinearEstimator, RecurrentEstimator
from lightning_dni.pipeline.restoring import left_out, pick_sequences
from lightning_dni.strategies.reducer import GradientReducer

DESCENT = partial(torch.optim.SGD, lr=0.1)
HALF = BATCH // 2


def rows_of(rank, chunks):
    """A process's sequences; None for all."""
    own = slice(None) if rank is None else slice(rank * HALF, (rank + 1) * HALF)
    return [(x[:, own], y[:, own], None if anew is None else anew[own]) for x, y, anew in chunks]


def one_begins_anew(number):
    """In the third chunk all sequences of the second process do."""
    chunks = draw_chunks(number)
    chunks[2][2][HALF:] = True
    return chunks


def train_replica(rank, several_losses=False, chunks_at_once=1, says_none=True, **options):
    """Weights of the net and of its estimator after a few chunks; where all begin, a process may say None."""
    net, state = Net(), None
    exchange = None if rank is None else GradientReducer()
    given = {"estimator": stirred, "estimator_optimizer": DESCENT, "seed": 3, **options}
    engine = DNIEngine(net, [], truncations=["core"], exchange=exchange, rank=rank or 0, **given)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    chunks = rows_of(rank, one_begins_anew(6))
    with engine:
        for k in range(0, len(chunks), chunks_at_once):
            block = engine.training_step(several_losses=True) if several_losses else nullcontext()
            with block:
                for x, y, anew in chunks[k : k + chunks_at_once]:
                    optimizer.zero_grad()
                    fresh = says_none and rank is not None and anew is not None and bool(anew.all())
                    state = None if fresh else begin_anew(net, state, anew)
                    with nullcontext() if several_losses else engine.training_step():
                        out, state = net(x, state)
                        loss = loss_of(out, y)
                    engine.backward(loss)
                    state = pytree.tree_map(torch.Tensor.detach, state)
                    optimizer.step()
                    engine.update_estimators()
    found = {n: t.clone() for n, t in net.state_dict().items()}
    (estimator,) = engine.estimators.values()
    return found | {f"estimator: {n}": t.clone() for n, t in estimator.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequence_end": "ignore", "estimator_steps": 3, "damping": 0.5},
        {"several_losses": True, "chunks_at_once": 2, "says_none": False},
        {"estimator": partial(RecurrentEstimator, hidden_size=4, future_weight=0.5)},
    ],
    ids=["a chunk a step", "ignore", "several losses", "recurrent"],
)
def test_two_processes_do_what_one_does_on_all_sequences(options):
    """Also where those of one process begin anew, with None, and those of the other go on."""
    first, second = on_ranks(partial(train_replica, **options))
    assert same_bits(first, second)
    assert_close(first, train_replica(None, **options), atol=1e-10)


def train_below(rank):
    """The gradients of the last chunk, with a boundary below the truncation."""
    rows = slice(None) if rank is None else slice(rank * HALF, (rank + 1) * HALF)
    own = [(x[rows], y[rows], goes_on[:, rows]) for x, y, goes_on in chunks_of(4)]
    exchange = None if rank is None else GradientReducer()
    return train(stirred_below, own, exchange=exchange, rank=rank or 0, seed=3)[-1]


def test_with_a_boundary_below_two_processes_do_what_one_does_on_all_sequences():
    """Gradients of the fourth chunk, which have in them what three updates of everything have done."""
    first, second = on_ranks(train_below)
    assert same_bits(first, second)
    assert_close(first, train_below(None), atol=1e-10)


def test_processes_stay_equal_where_one_hears_of_an_end_after_its_updates():
    """With several losses it is only known at the step's end that nobody goes on: averaged by itself."""
    first, second = on_ranks(partial(train_replica, several_losses=True, chunks_at_once=2))
    assert same_bits(first, second)


# ---- under a Trainer


class Reader(pl.LightningModule):
    """Reads its rows of a chunk per batch, and saves the states of all processes."""

    def __init__(self):
        super().__init__()
        self.net, self.state, self.seen = Net(), None, []

    def training_step(self, batch, batch_idx):
        x, y, anew = batch
        out, state = self.net(x, begin_anew(self.net, self.state, anew))
        self.state = pytree.tree_map(torch.Tensor.detach, state)
        loss = loss_of(out, y)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return DESCENT(self.parameters())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["states"] = [None] * dist.get_world_size()
        dist.all_gather_object(checkpoint["states"], self.state)

    def on_load_checkpoint(self, checkpoint):
        self.state = checkpoint["states"][self.trainer.global_rank]


class Logged(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if "net_core" in k})


def fit(rank, chunks, ckpt_path=None, on_nonfinite="raise", **options):
    none = torch.zeros(BATCH, dtype=torch.bool)
    own = rows_of(rank, [(x, y, none if anew is None else anew) for x, y, anew in chunks])
    kind = DNIStrategy if rank is None else partial(DNIDDPStrategy, timeout=TIMEOUT)
    strategy = kind(
        truncations=["net.core"],
        estimator=LinearEstimator,
        estimator_optimizer=DESCENT,
        sequence_end="ignore",
        on_nonfinite=on_nonfinite,
    )
    module, devices = Reader(), 1 if rank is None else 2
    given = {"devices": devices, "precision": "64-true", "use_distributed_sampler": False, **options}
    trainer = quiet_trainer(strategy, **given)
    trainer.fit(module, DataLoader(own, batch_size=None), ckpt_path=ckpt_path)
    return module, strategy


def stop_and_resume(rank, folder):
    chunks = one_begins_anew(6)
    straight, strategy = fit(rank, chunks)
    expected = state_of(straight, strategy)
    keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def stop(trainer, module, batch_idx):
        if batch_idx == 5:
            raise BrokenError

    with pytest.raises(BrokenError):
        fit(rank, chunks, callbacks=[keep, AtBatchStart(stop)], enable_checkpointing=True)
    path = f"{folder}/step=4.ckpt"
    kept = torch.load(path, weights_only=True)["lightning_dni"]
    assert "truncations" not in kept
    assert len(kept["replicas"]) == 2
    straight.trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    assert "replicas" not in torch.load(f"{folder}/weights.ckpt", weights_only=True)["lightning_dni"]
    resumed, strategy = fit(rank, chunks[4:], ckpt_path=path)
    assert resumed.seen == straight.seen[4:]
    return different(expected, state_of(resumed, strategy))


def test_a_fit_that_is_resumed_goes_on_from_each_processs_own_sequences(tmp_path):
    assert trainers(stop_and_resume, str(tmp_path)) == [[], []]


def save_in_mid_sequence(rank, path):
    module, _ = fit(rank, draw_chunks(3), max_steps=2)
    module.trainer.save_checkpoint(path)


def test_one_process_says_that_it_drops_what_the_sequences_of_two_go_on_from(tmp_path):
    trainers(save_in_mid_sequence, str(tmp_path / "two.ckpt"))
    dropped = r"what sequences go on from at \['net.core'\] is dropped: it is of 2 processes"
    own = rows_of(0, draw_chunks(6)[3:])
    with pytest.warns(UserWarning, match=dropped):
        module, _ = fit(None, own, ckpt_path=str(tmp_path / "two.ckpt"), max_epochs=2)
    assert len(module.seen) == 3


@pytest.mark.parametrize(
    ("saved", "processes", "lost"), [(1, 1, 0), (2, 2, 0), (1, 2, 1), (2, 1, 2), (2, 3, 2)]
)
def test_sequences_go_on_where_as_many_processes_have_saved_them(saved, processes, lost):
    each = [{"core": [f"ending of {rank}"]} for rank in range(saved)]
    state = {"truncations": each[0]} if saved == 1 else {"replicas": each}
    pick_sequences(state, processes, processes - 1)
    assert state == ({"replicas": each} if lost else {"truncations": each[processes - 1]})
    clauses = left_out({"estimators": {}, "boundaries": ["core"], **state}, ["core"], None)
    assert len(clauses) == (lost > 0)
    if lost:
        assert clauses[0].endswith("of one process" if lost == 1 else f"of {lost} processes")


def log_rows(rank, folder):
    logged = Logged()
    monitor = GradientMonitor(every_n_train_steps=1)
    fit(rank, one_begins_anew(5), callbacks=[monitor, logged], log_every_n_steps=1, default_root_dir=folder)
    return logged.rows


def test_the_monitor_adds_up_what_every_process_has_heard(tmp_path):
    """In the third chunk nothing goes on in the second process, which has no row to report."""
    first, second = trainers(log_rows, str(tmp_path / "two"))
    assert first == second
    expected = log_rows(None, str(tmp_path / "one"))
    assert [len(row) for row in expected] == [0, 3, 3, 3, 3]
    assert [pytest.approx(row, rel=1e-9) for row in first] == expected


def log_skipped(rank, folder):
    def spoil(trainer, module, batch_idx):
        if rank == 1 and batch_idx == 2:
            torch.nn.init.constant_(trainer.strategy.engine.estimators["net.core"].map.bias, float("nan"))

    logged = Logged()
    callbacks = [AtBatchStart(spoil), GradientMonitor(every_n_train_steps=1), logged]
    options = {"callbacks": callbacks, "log_every_n_steps": 1, "default_root_dir": folder}
    fit(rank, draw_chunks(4), on_nonfinite="skip", **options)
    return [row["dni_skipped/net_core"] for row in logged.rows if row]


def test_what_one_process_skips_is_counted_in_all(tmp_path):
    first, second = trainers(log_skipped, str(tmp_path))
    assert first == second
    assert first[0] == 0 < first[1] < first[2]
