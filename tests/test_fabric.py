"""The engine in a Fabric loop is the engine in a plain one: the guide's example, to the bit."""

import contextlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from core.nets import same_bits, weights
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni.core import DNIEngine
from lightning_dni.errors import BoundaryError
from lightning_dni.estimators import LinearEstimator

GUIDE = Path(__file__).parents[1] / "docs/fabric.md"
ESTIMATOR = partial(LinearEstimator, num_classes=2)
PRECISIONS = {
    "32-true": contextlib.nullcontext,
    "bf16-mixed": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}


def example(precision="32-true", **replace):
    """The guide's example, run; returns its variables."""
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 30
    for old, new in {'"32-true"': f'"{precision}"', **replace}.items():
        assert old in block
        block = block.replace(old, new)
    found = {}
    exec(block, found)
    return found


def small_net():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def plain_loop(precision="32-true", epochs=10, bp_lambda=0.0):
    """The same in plain torch."""
    torch.manual_seed(0)
    net, x = small_net(), torch.randn(256, 20)
    data = DataLoader(TensorDataset(x, (x[:, :10].sum(1) > 0).long()), batch_size=32, shuffle=True)
    engine = DNIEngine(net, ["1", "3"], ESTIMATOR, bp_lambda=bp_lambda)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    with engine:
        for _ in range(epochs):
            for batch in data:
                optimizer.zero_grad()
                with engine.training_step(batch):
                    with PRECISIONS[precision]():
                        out = net(batch[0])
                    loss = F.cross_entropy(out.float(), batch[1])
                engine.backward(loss)
                optimizer.step()
                engine.update_estimators()
    return net, engine


def estimators_of(engine):
    return {f"{n}.{k}": v for n, e in engine.estimators.items() for k, v in e.state_dict().items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_guides_example_is_the_plain_loop(precision):
    found = example(precision)
    net, engine = plain_loop(precision)
    assert same_bits(weights(found["net"]), weights(net))
    assert same_bits(estimators_of(found["engine"]), estimators_of(engine))
    assert len(estimators_of(engine)) == 6


def test_the_guides_example_learns():
    found = example()
    assert (found["net"](found["x"]).argmax(1) == (found["x"][:, :10].sum(1) > 0)).float().mean() > 0.9


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_lambda_is_fabrics_own_training(precision):
    """Without the engine's lines the guide's loop is plain Fabric."""
    lines = {
        "num_classes=2)": "num_classes=2), bp_lambda=1.0",
        "range(10)": "range(2)",
    }
    without = {
        **{
            f"            {line}\n": ""
            for line in (
                "loss = engine.prepare_backward(loss)",
                "engine.finish_backward()",
                "engine.update_estimators()",
            )
        },
        "with engine:": "if True:",
        "with engine.training_step(batch):": "if True:",
        "range(10)": "range(2)",
    }
    decoupled = example(precision, **lines)
    plain = example(precision, **without)
    assert not plain["engine"].estimators
    assert len(decoupled["engine"].estimators) == 2
    assert same_bits(weights(decoupled["net"]), weights(plain["net"]))


def test_names_in_fabrics_wrapper_are_those_that_the_guide_says():
    lines = {
        'engine = DNIEngine(net, ["1", "3"], partial(LinearEstimator, num_classes=2))\n': "",
        "with engine:": 'engine = DNIEngine(model, ["_forward_module.1", "_forward_module.3"], '
        "partial(LinearEstimator, num_classes=2))\nwith engine:",
    }
    found = example(**lines)
    assert same_bits(weights(found["net"]), weights(plain_loop()[0]))
    with pytest.raises(BoundaryError, match=r"submodules of _FabricModule, but got '1'\."):
        DNIEngine(found["model"], ["1"], ESTIMATOR)


def test_a_compiled_module_may_be_set_up():
    found = example(**{"fabric.setup(net,": "fabric.setup(torch.compile(net, backend='eager'),"})
    assert same_bits(weights(found["net"]), weights(plain_loop()[0]))
    torch.compiler.reset()


def test_a_saved_run_goes_on():
    first = example()
    fabric = Fabric(accelerator="cpu", devices=1)
    net = small_net()
    engine = DNIEngine(net, ["1", "3"], ESTIMATOR)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    fabric.load("run.ckpt", {"model": model, "optimizer": optimizer, "engine": engine})
    assert same_bits(weights(net), weights(first["net"]))
    assert same_bits(estimators_of(engine), estimators_of(first["engine"]))
    batch = first["batch"]
    for e, m, o in [(engine, model, optimizer), (first["engine"], first["model"], first["optimizer"])]:
        with e:
            o.zero_grad()
            with e.training_step(batch):
                loss = F.cross_entropy(m(batch[0]), batch[1])
            e.backward(loss)
            o.step()
            e.update_estimators()
    assert same_bits(weights(net), weights(first["net"]))
    assert same_bits(estimators_of(engine), estimators_of(first["engine"]))
