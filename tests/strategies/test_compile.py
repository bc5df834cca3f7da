"""Fits of compiled modules are the fits of the same modules."""

import pytest
import torch
from core.nets import same_bits
from fits import Net as Module
from fits import dni, loader, quiet_trainer


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(compile_it, bp_lambda=0.0, module=Module):
    torch.manual_seed(0)
    model = module(dropout=0.2, batch_norm=True)
    wrapper = compile_it(model)
    fitted = model if wrapper is None else wrapper
    trainer = quiet_trainer(dni(bp_lambda=bp_lambda))
    torch.manual_seed(0)
    for _ in range(2):
        trainer.fit(fitted, loader(24))
        trainer.fit_loop.max_epochs += 1
    assert trainer.global_step == 6
    return {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}


def parent(model):
    model.net = torch.compile(model.net, backend="eager")


def each_child(model):
    for child in model.net:
        child.compile(backend="eager")


@pytest.mark.parametrize(("compile_it", "bp_lambda"), [(parent, 0.0), (each_child, 1.0)])
def test_fits_are_the_same(compile_it, bp_lambda):
    assert same_bits(trained(compile_it, bp_lambda), trained(lambda model: None, bp_lambda))


class Silent(Module):
    """Lightning cannot compile `self.log`."""

    def log(self, *args, **kwargs):
        pass


def test_a_compiled_lightning_module_is_the_same():
    def wrapped(model):
        return torch.compile(model, backend="eager")

    assert same_bits(trained(wrapped, module=Silent), trained(lambda model: None, module=Silent))
