"""Chunks of sequences under a Trainer: a plain LightningModule that keeps its state from batch to batch."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from core.recurrent import BATCH, Net, begin_anew, draw_chunks, engine_of, loss_of, train_by_hand
from fits import AtBatchStart, BrokenError, different, hooks_on, quiet_trainer, weights
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from lightning_dni import DNIPipelineStrategy, DNIStrategy, GradientMonitor
from lightning_dni.errors import EstimatorError
from lightning_dni.estimators import LinearEstimator, MLPEstimator, RecurrentEstimator, ZeroEstimator
from lightning_dni.pipeline.engine import StageEngine

DESCENT = partial(torch.optim.SGD, lr=0.1)


class Reader(pl.LightningModule):
    """Reads a chunk per batch; nothing in it knows of synthetic gradients."""

    def __init__(self, kind="lstm", optimizer=DESCENT):
        super().__init__()
        self.net, self.state, self.make = Net(kind), None, optimizer
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y, anew = batch
        state = begin_anew(self.net, self.state, anew)
        out, state = self.net(x, state)
        self.state = pytree.tree_map(torch.Tensor.detach, state)
        loss = loss_of(out, y)
        self.log("loss", loss)
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.net(batch[0], self.state)

    def configure_optimizers(self):
        return self.make(self.parameters())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state"] = self.state

    def on_load_checkpoint(self, checkpoint):
        self.state = checkpoint["state"]


class ByHand(Reader):
    """The same with manual optimization, two chunks in a batch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for x, y, anew in batch:
            out, state = self.net(x, begin_anew(self.net, self.state, anew))
            self.state = pytree.tree_map(torch.Tensor.detach, state)
            optimizer.zero_grad()
            self.manual_backward(loss_of(out, y))
            optimizer.step()


def chunks_of(number, **options):
    none = torch.zeros(BATCH, dtype=torch.bool)
    return [(x, y, none if anew is None else anew) for x, y, anew in draw_chunks(number, **options)]


class Chunks:
    """A loader that goes on where its state says it was."""

    def __init__(self, chunks):
        self.chunks, self.position = chunks, 0

    def __len__(self):
        return len(self.chunks)

    def __iter__(self):
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield self.chunks[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def loader(chunks):
    return DataLoader(chunks, batch_size=None, shuffle=False)


def strategy(estimator=LinearEstimator, kind=DNIStrategy, **options):
    given = {"truncations": ["net.core"], "estimator": estimator, "estimator_optimizer": DESCENT}
    return kind(**{**given, **options})


def fit(module, how, chunks, val=None, ckpt_path=None, **options):
    trainer = quiet_trainer(how, **{"precision": "64-true", **options})
    torch.manual_seed(0)
    trainer.fit(module, loader(chunks) if isinstance(chunks, list) else chunks, val, ckpt_path=ckpt_path)
    return trainer


def test_a_fit_is_the_loop_written_by_hand():
    module, twin, chunks = Reader(), Net(), chunks_of(5)
    width = 2 * (2 + 3)
    train_by_hand(twin, chunks, torch.zeros(width, width).double(), torch.zeros(width).double(), damping=0.5)
    fit(module, strategy(damping=0.5), chunks)
    assert_close(list(module.net.parameters()), list(twin.parameters()), rtol=1e-10, atol=1e-10)
    assert hooks_on(module) == 0


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_with_a_zero_estimator_a_fit_is_a_plain_one_to_the_bit(options):
    modules = [Reader(kind, partial(torch.optim.Adam, lr=1e-2)) for kind in ("gru", "gru")]
    for module, how in zip(modules, (strategy(ZeroEstimator), "auto"), strict=True):
        fit(module, how, chunks_of(6), val=loader(chunks_of(2, seed=5)), val_check_interval=2, **options)
    assert different(*map(weights, modules)) == []
    assert modules[0].seen == modules[1].seen


def test_validation_in_between_changes_no_number():
    modules = [Reader(), Reader()]
    for module, val in zip(modules, (None, loader(chunks_of(2, seed=5))), strict=True):
        fit(module, strategy(), chunks_of(6), val=val, val_check_interval=2, num_sanity_val_steps=2)
    assert different(*map(weights, modules)) == []
    assert modules[0].seen == modules[1].seen


@pytest.mark.parametrize(
    "estimator",
    [partial(MLPEstimator, hidden_sizes=(4,)), partial(RecurrentEstimator, hidden_size=4, future_weight=0.5)],
    ids=["mlp", "recurrent"],
)
def test_a_fit_that_is_resumed_in_mid_epoch_is_the_one_that_was_not_stopped(tmp_path, estimator):
    make = partial(strategy, estimator, estimator_optimizer=torch.optim.Adam)
    straight, stopped, resumed = Reader(), Reader(), Reader()
    chunks = chunks_of(7)
    fit(straight, make(), Chunks(chunks))
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def stop(trainer, module, batch_idx):
        if batch_idx == 4:
            raise BrokenError

    with pytest.raises(BrokenError):
        fit(stopped, make(), Chunks(chunks), callbacks=[keep, AtBatchStart(stop)], enable_checkpointing=True)
    path = str(tmp_path / "step=4.ckpt")
    assert torch.load(path, weights_only=True)["lightning_dni"]["truncations"]["net.core"]
    fit(resumed, make(), Chunks(chunks), ckpt_path=path)
    assert resumed.seen == straight.seen[4:]
    assert different(weights(straight), weights(resumed)) == []


def test_manual_optimization_with_several_chunks_in_a_batch_is_the_same():
    """And the estimator steps with the user's optimizer, after every chunk."""
    chunks = chunks_of(6)
    modules = [Reader(), ByHand()]
    fit(modules[0], strategy(), chunks)
    fit(modules[1], strategy(), [chunks[k : k + 2] for k in (0, 2, 4)])
    assert different(*map(weights, modules)) == []


def test_it_learns_in_mixed_precision_with_estimators_in_full():
    modules, trainers = [Reader("lstm"), Reader("lstm")], []
    chunks = [(x.float(), y.float(), anew) for x, y, anew in chunks_of(5)]
    for module, precision in zip(modules, ("32-true", "bf16-mixed"), strict=True):
        module.net.float()
        trainers.append(fit(module, strategy(), chunks, precision=precision))
    mine = trainers[1].strategy.engine.estimators["net.core"].map.weight
    assert mine.dtype == torch.float32
    assert mine.any()
    for one, other in zip(*(list(module.parameters()) for module in modules), strict=True):
        assert_close(one, other, rtol=0.05, atol=0.02)


def test_the_monitor_compares_with_what_came_back(tmp_path):
    class Logged(pl.Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.rows.append({k: v for k, v in trainer.callback_metrics.items() if "net_core" in k})

    logged = Logged()
    fit(
        Reader(),
        strategy(),
        chunks_of(4),
        callbacks=[GradientMonitor(every_n_train_steps=1), logged],
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    found = {f"dni_{m}/net_core" for m in ("target_error", "target_cosine", "sg_loss")}
    assert [set(row) for row in logged.rows] == [set(), found, found, found]
    assert logged.rows[1]["dni_target_error/net_core"] == 1.0  # it has said zero


@pytest.mark.parametrize("sequence_end", ["zero", "ignore"])
def test_the_monitor_compares_nothing_where_all_sequences_begin_anew(tmp_path, sequence_end):
    """No error in its summary is infinite, or not a number."""
    monitor = GradientMonitor(every_n_train_steps=1)
    chunks = [(x, y, torch.full((BATCH,), k % 3 == 0)) for k, (x, y, _) in enumerate(draw_chunks(9))]
    options = {"log_every_n_steps": 1, "default_root_dir": tmp_path}
    fit(Reader(), strategy(sequence_end=sequence_end), chunks, callbacks=[monitor], **options)
    for metric in ("target_error", "target_cosine", "sg_loss"):
        found = torch.tensor(monitor.state_dict()["recent"][f"dni_{metric}/net_core"])
        assert len(found) == 6
        assert found.isfinite().all()


def test_the_table_tells_what_stands_at_the_end_of_a_chunk(capsys):
    strategy().describe(Reader())
    assert "LinearEstimator" in capsys.readouterr().out


class Configured(Reader):
    def configure_dni(self):
        return {
            "truncations": ["net.core"],
            "estimator": LinearEstimator,
            "estimator_optimizer": DESCENT,
        }


def test_the_module_may_name_its_truncations_itself():
    modules = [Configured(), Reader()]
    fit(modules[0], "dni", chunks_of(3))
    fit(modules[1], strategy(), chunks_of(3))
    assert different(*map(weights, modules)) == []


def test_stages_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"Expected no `truncations` in a pipeline, but .* Train under"
    ):
        DNIPipelineStrategy().describe(Configured())
    with pytest.raises(EstimatorError, match="Expected no `truncations` in a pipeline"):
        StageEngine(Net(), [], LinearEstimator, truncations=["core"])


def test_an_estimator_without_a_place_is_refused():
    with pytest.raises(MisconfigurationException, match="`truncations` and `estimator`"):
        DNIStrategy(truncations=["net.core"])


def test_the_engine_alone_trains_in_a_plain_loop():
    net = Net()
    assert engine_of(net, LinearEstimator).boundaries == ("core",)
