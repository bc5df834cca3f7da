"""A fit whose module stays where it is until its stages are known, as it does where they have devices."""

import torch
from fits import different, loader, net, weights
from strategies.pipelined import STAGES
from strategies.staged_fits import fit_staged, on_stages, staged

from lightning_dni.strategies.part import PartOnDevice
from lightning_dni.strategies.staged import StagedTraining


class Waiting(type(staged())):
    """Brings its part also to the CPU, which stands for a device; a copy shows what was brought."""

    _holds_a_part = True


def fits(rank, path):
    """A fit, a checkpoint, and a fit that goes on from it; the same with a strategy that waits."""
    found = []
    for kind in (type(staged()), Waiting):
        strategy = kind(boundaries=STAGES[2], estimator=staged()._options.estimator, staleness=1)
        module = net(dropout=0.2, batch_norm=True, optimizer="adam")
        trainer = fit_staged(2, module, val=loader(16), strategy=strategy, num_sanity_val_steps=1)
        trainer.save_checkpoint(f"{path}/{kind.__name__}.ckpt")
        owned = [len(o.state) for o in trainer.optimizers]
        strategy = kind(boundaries=STAGES[2], estimator=staged()._options.estimator, staleness=1)
        again = net(optimizer="adam", dropout=0.2, batch_norm=True)
        fit_staged(2, again, strategy=strategy, max_epochs=2, ckpt_path=f"{path}/{kind.__name__}.ckpt")
        found.append((weights(module), weights(again), owned))
    return found


def test_waiting_for_the_first_batch_changes_no_number(tmp_path):
    for (module, again, owned), (waited, went_on, held) in on_stages(fits, str(tmp_path), seconds=240):
        assert different(module, waited) == []
        assert different(again, went_on) == []
        assert owned == held
    plain, waiting = (torch.load(tmp_path / f"{n}.ckpt") for n in ("DNIPipelineStrategy", "Waiting"))
    assert different(plain["state_dict"], waiting["state_dict"]) == []
    states = [c["optimizer_states"][0]["state"] for c in (plain, waiting)]
    assert states[0].keys() == states[1].keys()
    for one, other in zip(*(s.values() for s in states), strict=True):
        assert different(one, other) == []


def test_the_cpu_takes_the_whole_module_at_once():
    assert issubclass(StagedTraining, PartOnDevice)
    strategy = staged()
    strategy.parallel_devices = [torch.device("cpu")]
    assert not strategy._holds_a_part
