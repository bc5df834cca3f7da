"""Copy and repeat copy: what the chunks hold, and when sequences get longer."""

import itertools

import pytest
import torch
from fits import quiet_trainer

from lightning_dni import DNIStrategy
from lightning_dni.demos import CopyCurriculum, CopyDataModule, CopyModel
from lightning_dni.estimators import LinearEstimator

SYMBOLS, SILENT = 4, -100


def read(task, number, rows=3, chunk_length=2, harder=0):
    """The whole sequences in the first `number` chunks of each row: (inputs, targets) in plain numbers."""
    stream = CopyDataModule(task, chunk_length, rows, SYMBOLS, seed=1).stream
    for _ in range(harder):
        stream.lengthen()
    chunks = list(itertools.islice(stream, number))
    found = []
    for row in range(rows):
        sequences = []
        for x, y, anew, _ in chunks:
            if anew[row]:
                sequences.append(([], []))
            if sequences:
                sequences[-1][0].extend(x[:, row].tolist())
                sequences[-1][1].extend(y[:, row].tolist())
        found.append(sequences[:-1])
    return stream, found


@pytest.mark.parametrize(
    ("task", "harder", "length", "copies"),
    [("copy", 0, 1, 1), ("copy", 3, 4, 1), ("repeat_copy", 0, 1, 1), ("repeat_copy", 3, 3, 2)],
)
def test_a_sequence_asks_for_the_symbols_that_it_has_shown(task, harder, length, copies):
    stream, rows = read(task, 40, harder=harder)
    assert (stream.length, stream.copies, stream.dependency) == (length, copies, length * copies)
    assert all(len(sequences) > 2 for sequences in rows)
    for inputs, targets in itertools.chain(*rows):
        shown = [step.index(1.0) for step in inputs[:length]]
        assert max(shown) < SYMBOLS
        sign = [0.0] * SYMBOLS + [1.0, copies / 10]
        assert inputs[length] == pytest.approx(sign)
        assert not any(map(any, inputs[length + 1 :]))
        asked = [SILENT] * (length + 1) + shown * copies + [SYMBOLS] * (task == "repeat_copy")
        assert targets == asked + [SILENT] * (len(targets) - len(asked))
        assert len(targets) == -(-len(asked) // 2) * 2


def test_sequences_of_a_batch_are_at_places_of_their_own_and_the_same_for_a_seed():
    _, y, anew, _ = next(iter(CopyDataModule("copy", 2, 4, SYMBOLS).stream))
    assert anew.tolist() == [True, False, True, False]
    again = next(iter(CopyDataModule("copy", 2, 4, SYMBOLS).stream))
    assert torch.equal(y, again.targets)


@pytest.mark.parametrize("task", ["copy", "repeat_copy"])
def test_the_context_holds_the_targets_that_follow_in_the_sequence(task):
    stream = CopyDataModule(task, 2, 3, SYMBOLS, look_ahead=5).stream
    for _ in range(4):
        stream.lengthen()
    chunks = list(itertools.islice(stream, 30))
    for k, chunk in enumerate(chunks[:20]):
        for row in range(3):
            after = itertools.takewhile(lambda later, row=row: not later.anew[row], chunks[k + 1 :])
            coming = [y for later in after for y in later.targets[:, row].tolist()][:5]
            coming += [SILENT] * (5 - len(coming))
            seen = chunk.ahead[row].view(5, SYMBOLS + 1)
            assert [step.argmax().item() if step.any() else SILENT for step in seen] == coming
            assert seen.sum() == sum(y != SILENT for y in coming)


class Knows(CopyModel):
    """Says what it is asked, with few bits of error."""

    def training_step(self, batch, batch_idx):
        said = super().training_step(batch, batch_idx)
        return said | {"nats": 0.1 * 0.6931 * said["said"]}


@pytest.mark.parametrize(("threshold", "solved"), [(0.15, [0, 1, 1, 1, 1, 2]), (0.05, [0] * 6)])
def test_sequences_get_longer_once_the_error_is_small(threshold, solved):
    """Judged after the chunks of two sequences: of one chunk each, then of two."""
    curriculum, data = CopyCurriculum(threshold), CopyDataModule("copy", 3, 4, SYMBOLS)
    seen = []
    trainer = quiet_trainer(callbacks=[curriculum], max_steps=6, max_epochs=-1)

    class Watch(type(curriculum)):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append(self.solved)

    trainer.callbacks[trainer.callbacks.index(curriculum)] = Watch(threshold)
    trainer.fit(Knows(symbols=SYMBOLS, hidden_size=4), data)
    assert seen == solved
    if solved[-1]:
        assert trainer.callback_metrics["solved_length"] == solved[-1]
        assert trainer.callback_metrics["bits"] == pytest.approx(0.1, rel=1e-3)


def test_the_model_trains_on_synthetic_gradients():
    strategy = DNIStrategy(truncations=["lstm"], estimator=LinearEstimator)
    trainer = quiet_trainer(strategy, max_steps=4, max_epochs=-1)
    torch.manual_seed(0)
    trainer.fit(CopyModel(hidden_size=4), CopyDataModule(chunk_length=2, batch_size=4))
    assert strategy.engine.estimators["lstm"].map.weight.any()


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (CopyDataModule, {"task": "paste"}, "`task` to be one of 'copy', 'repeat_copy'"),
        (CopyDataModule, {"chunk_length": 0}, "`chunk_length` to be an integer of at least 1"),
        (CopyDataModule, {"symbols": 1}, "`symbols` to be an integer of at least 2"),
        (CopyModel, {"hidden_size": 0}, "`hidden_size` to be an integer of at least 1"),
        (CopyModel, {"learning_rate": 0.0}, "`learning_rate` to be a finite number above 0"),
        (CopyCurriculum, {"threshold": -1.0}, "`threshold` to be a finite number above 0"),
    ],
)
def test_an_argument_out_of_its_range_is_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
