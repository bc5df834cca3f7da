"""What was trained can be copied, pickled and exported, in mid-fit too, and is what it was without us."""

import copy
import io
import pickle
from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch
from fits import FEATURES, AtBatchEnd, Net, different, dni, fit, hooks_on, loader, net, quiet_trainer, weights
from strategies.loops import MLP
from versions import newer_torch

X = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(7))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved_whole(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def exported(module):
    return torch.export.export(module, (X,)).module()


def exported_file(module):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (X,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def traced(module):
    return torch.jit.trace(module, X)


def to_torchscript(module):
    return module.to_torchscript(method="trace", example_inputs=X)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_whole}
EXPORTS = {
    "export": exported,
    "export, from a file": exported_file,
    "trace": traced,
    "torchscript": to_torchscript,
}


@pytest.fixture(scope="module")
def trained():
    """A module trained at lambda 0, with its scores in eval mode."""
    module = net(dropout=0.3, batch_norm=True)
    fit(module, dni(), max_epochs=2)
    module.eval()
    with torch.no_grad():
        return module, module(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", COPIES | EXPORTS)
def test_a_trained_module_says_the_same_after_it_was_copied_or_exported(trained, how):
    module, scores = trained
    made = (COPIES | EXPORTS)[how](module)
    with torch.no_grad():
        assert torch.equal(made(X), scores)


@pytest.mark.skipif(not find_spec("onnx"), reason="onnx is not installed")
def test_a_trained_module_is_written_as_onnx(trained, tmp_path):
    module, _ = trained
    module.to_onnx(tmp_path / "module.onnx", X)
    assert (tmp_path / "module.onnx").stat().st_size


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_trained_module_trains_on_as_the_module_does(trained, how):
    ends = []
    for make in (copy.deepcopy, COPIES[how]):
        twin = make(trained[0]).train()
        assert hooks_on(twin) == 0
        fit(twin, dni(estimator=MLP))
        ends.append(weights(twin))
    assert different(*ends) == []


@newer_torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", COPIES | EXPORTS)
def test_a_module_may_be_copied_or_exported_in_mid_fit(how):
    """What is made there is a plain module, and the run goes on as if nothing had been made."""
    made = []

    def act(trainer, module, batch_idx):
        if batch_idx == 4:
            state = torch.get_rng_state()
            module.eval()
            with torch.no_grad():
                twin = (COPIES | EXPORTS)[how](module)
                made.append((twin, torch.equal(twin(X), module(X))))
            module.train()
            torch.set_rng_state(state)

    module, undisturbed = net(dropout=0.3), net(dropout=0.3)
    fit(undisturbed, dni())
    fit(module, dni(), callbacks=[AtBatchEnd(act)])
    ((copied, says_the_same),) = made
    assert says_the_same
    assert different(weights(module), weights(undisturbed)) == []
    if how in COPIES:
        copied.train()
        copied(X).sum().backward()
        assert all(p.grad is not None for p in copied.parameters())  # not cut


def test_a_copy_may_be_made_in_the_midst_of_a_step():
    """Within training_step, where the cuts are live, a copy is not cut."""
    complete = []

    class Copies(Net):
        def training_step(self, batch, batch_idx):
            twin = pickled(self.net) if batch_idx % 2 else copy.deepcopy(self)
            twin(batch[0]).sum().backward()
            complete.append(all(p.grad is not None for p in twin.parameters()))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Copies()
    fit(module, dni(), loader(32))
    twin = net()
    fit(twin, dni(), loader(32))
    assert complete == [True] * 4
    assert different(weights(module), weights(twin)) == []


def test_a_trainer_and_its_strategy_can_be_copied_before_a_fit():
    """As a user's sweep does: one configured Trainer, a copy for each run."""
    ends = []
    template = quiet_trainer(dni())
    for trainer in (copy.deepcopy(template), copy.deepcopy(template), template):
        module = net()
        torch.manual_seed(0)
        trainer.fit(module, loader())
        ends.append(weights(module))
    assert different(ends[0], ends[1]) == different(ends[0], ends[2]) == []


def test_a_trainer_that_was_copied_after_a_fit_goes_on_as_it_would_have():
    """The copy has estimators of its own, with what they have learnt."""
    module = net()
    trainer = fit(module, dni())
    twin = copy.deepcopy(trainer)
    ends = []
    for each in (trainer, twin):
        each.fit_loop.max_epochs = 2
        each.fit(each.lightning_module, loader())
        estimators = each.strategy.engine.estimators
        ends.append(weights(each.lightning_module) | estimators["net.0"].state_dict())
    assert twin.lightning_module is not module
    assert different(*ends) == []


def test_a_strategy_survives_pickling_with_its_options():
    strategy = pickled(dni(bp_lambda=0.5))
    module, twin = net(), net()
    fit(module, strategy)
    fit(twin, dni(bp_lambda=0.5))
    assert different(weights(module), weights(twin)) == []


def test_the_estimators_of_a_fit_can_be_taken_along():
    """`engine.estimators` are modules like any other: state_dict, pickle, deepcopy."""
    strategy = dni(estimator=MLP)
    fit(net(), strategy)
    for estimator in strategy.engine.estimators.values():
        for make in COPIES.values():
            assert different(make(estimator).state_dict(), estimator.state_dict()) == []


class Wrapper(pl.LightningModule):
    """A LightningModule around one that is trained elsewhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_trained_module_may_be_trained_on_inside_another():
    module = net()
    fit(module, dni())
    twin = copy.deepcopy(module)
    fit(Wrapper(module), dni(boundaries=["inner.net.0", "inner.net.1"]))
    fit(twin, dni())
    assert different(weights(module), weights(twin)) == []
