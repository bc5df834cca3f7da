"""The demo classifiers have named blocks, plain logging and strict arguments."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from versions import safe_loading

from lightning_dni.demos import ConvClassifier, MLPClassifier
from lightning_dni.demos.models import ACTIVATIONS, OPTIMIZERS

CLASSIFIERS = [
    pytest.param(lambda **options: MLPClassifier(hidden_size=16, **options), id="mlp"),
    pytest.param(lambda **options: ConvClassifier(channels=(4, 8), **options), id="conv"),
]


def names_and_types(module):
    return [(name, type(child)) for name, child in module.named_children()]


def images(size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, 1, 8, 8, generator=generator), torch.arange(size) % 10


def quiet_trainer(**options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **options,
        }
    )


def test_mlp_blocks_are_named():
    net = MLPClassifier(input_size=6, hidden_size=5, num_hidden=2, num_classes=3).net
    assert names_and_types(net) == [
        ("hidden_0", nn.Sequential),
        ("hidden_1", nn.Sequential),
        ("output", nn.Linear),
    ]
    for block in (net.hidden_0, net.hidden_1):
        assert [type(layer) for layer in block] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    shapes = [tuple(layer.weight.shape) for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert shapes == [(5, 6), (5, 5), (3, 5)]


@pytest.mark.parametrize(("num_hidden", "below"), [(2, 1), (5, 2), (20, 10)])
def test_mlp_marks_its_middle_at_any_depth(num_hidden, below):
    marked, plain = (
        MLPClassifier(hidden_size=4, num_hidden=num_hidden, mark_middle=m).eval() for m in (True, False)
    )
    names = [name for name, _ in marked.net.named_children()]
    assert names.index("middle") == below
    assert [name for name in names if name != "middle"] == [name for name, _ in plain.net.named_children()]
    plain.load_state_dict(marked.state_dict())
    inputs, _ = images()
    assert_close(marked(inputs), plain(inputs), rtol=0, atol=0)


def test_weight_decay_is_a_penalty_on_the_squared_norm():
    model = MLPClassifier(hidden_size=5, optimizer="sgd", learning_rate=0.5, weight_decay=0.1)
    inputs, targets = images()
    penalty = 0.05 * sum(p.square().sum() for p in model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    slopes = torch.autograd.grad(loss + penalty, list(model.parameters()), retain_graph=True)
    expected = [p.detach() - 0.5 * slope for p, slope in zip(model.parameters(), slopes, strict=True)]
    optimizer = model.configure_optimizers()
    loss.backward()
    optimizer.step()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.detach(), other, rtol=1e-5, atol=1e-6)


def test_squared_error_is_half_the_squared_distance_to_one_hot_labels():
    """Of which, other than of cross-entropy, the derivatives do not sum to zero over the classes."""
    inputs, targets = images()
    model = MLPClassifier(hidden_size=5, loss="squared_error").eval()
    scores = model(inputs).detach().requires_grad_()
    model.net, losses = nn.Identity(), {}
    model.log = lambda name, value, **options: losses.update({name: value})
    model.forward = lambda inputs: scores
    loss = model.training_step((inputs, targets), 0)
    model.validation_step((inputs, targets), 0)
    expected = sum(
        0.5 * float((row - nn.functional.one_hot(k, 10)).square().sum())
        for row, k in zip(scores, targets, strict=True)
    )
    assert float(loss) == pytest.approx(expected / 24)
    assert losses["train_loss"] == losses["val_loss"] == loss
    (slope,) = torch.autograd.grad(loss, scores)
    assert float(slope.sum(1).abs().min()) > 1e-4
    (other,) = torch.autograd.grad(F.cross_entropy(scores, targets), scores)
    assert float(other.sum(1).abs().max()) < 1e-6


def test_another_loss_is_refused():
    with pytest.raises(ValueError, match="Expected `loss` to be one of 'cross_entropy', 'squared_error'"):
        MLPClassifier(loss="hinge")


def test_mlp_without_hidden_blocks_is_linear():
    assert names_and_types(MLPClassifier(num_hidden=0).net) == [("output", nn.Linear)]


def test_mlp_flattens_its_input():
    model = MLPClassifier().eval()
    inputs, _ = images()
    assert model(inputs).shape == (24, 10)
    assert_close(model(inputs), model(inputs.flatten(1)), rtol=0, atol=0)


def test_conv_blocks_are_named():
    net = ConvClassifier(in_channels=3, channels=[4, 8], num_classes=5).net
    assert names_and_types(net) == [
        ("block_0", nn.Sequential),
        ("block_1", nn.Sequential),
        ("head", nn.Sequential),
    ]
    for block in (net.block_0, net.block_1):
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("size", [1, 8, 28])
def test_conv_takes_images_of_any_size(size):
    model = ConvClassifier(in_channels=3, channels=(4, 8, 8), num_classes=5)
    assert model(torch.rand(2, 3, size, size + 1)).shape == (2, 5)


def test_the_head_sees_averages_of_parts_of_the_image():
    model = ConvClassifier(channels=(4,), pooled_size=2).eval()
    inputs, _ = images()
    h = model.net.block_0(inputs)
    quarters = [h[..., i : i + 4, j : j + 4].mean((2, 3)) for i in (0, 4) for j in (0, 4)]
    weight = model.net.head[2].weight.unflatten(1, (4, 4))  # a column for each quarter of each channel
    expected = sum(part @ weight[..., k].T for k, part in enumerate(quarters)) + model.net.head[2].bias
    assert_close(model(inputs), expected)


def test_conv_halves_after_the_first_block():
    net = ConvClassifier(channels=(4, 8)).net
    first = net.block_0(torch.rand(2, 1, 8, 8))
    assert first.shape == (2, 4, 8, 8)
    assert net.block_1(first).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_batch_norm_can_be_left_out(make):
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert any(isinstance(module, norms) for module in make().modules())
    assert not any(isinstance(module, norms) for module in make(batch_norm=False).modules())


@pytest.mark.parametrize("make", CLASSIFIERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_the_one_named(make, activation):
    kinds = [type(module) for module in make(activation=activation).modules()]
    assert type(ACTIVATIONS[activation]()) in kinds


@pytest.mark.parametrize("make", CLASSIFIERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_is_the_one_named(make, optimizer):
    model = make(optimizer=optimizer, learning_rate=0.5)
    configured = model.configure_optimizers()
    assert type(configured) is OPTIMIZERS[optimizer]
    assert configured.param_groups[0]["lr"] == 0.5
    assert len(configured.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_logged_numbers_are_the_exact_ones(make):
    """Batches of 16 and 8: a mean over batches would weigh the short one too much."""
    model = make()
    inputs, targets = images()
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16)
    trainer = quiet_trainer()
    (logged,) = trainer.validate(model, loader, verbose=False)
    logits = model.eval()(inputs)
    accuracy = (logits.argmax(1) == targets).float().mean().item()
    loss = F.cross_entropy(logits, targets).item()
    expected = {"val_loss": loss, "val_accuracy": accuracy, "val_error": 100 * (1 - accuracy)}
    assert logged == pytest.approx(expected, rel=1e-5)
    (tested,) = trainer.test(model, loader, verbose=False)
    expected = {"test_accuracy": accuracy, "test_error": 100 * (1 - accuracy)}
    assert tested == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_metrics_start_anew_every_epoch(make):
    model = make(learning_rate=1e-12)
    loader = DataLoader(TensorDataset(*images()), batch_size=16)
    trainer = quiet_trainer()
    first, second = (trainer.validate(model, loader, verbose=False) for _ in range(2))
    assert first == second


def test_train_loss_is_that_of_the_step(tmp_path):
    model = MLPClassifier(hidden_size=16)
    inputs, targets = images()
    expected = F.cross_entropy(model(inputs), targets).item()
    trainer = quiet_trainer(logger=CSVLogger(tmp_path), max_steps=1)
    trainer.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=24))
    assert trainer.logged_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_hyperparameters_are_primitives():
    assert dict(MLPClassifier(hidden_size=16).hparams) == {
        "input_size": 64,
        "hidden_size": 16,
        "num_hidden": 3,
        "num_classes": 10,
        "batch_norm": True,
        "activation": "relu",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "mark_middle": False,
        "loss": "cross_entropy",
    }
    assert dict(ConvClassifier(channels=(4, 8)).hparams) == {
        "in_channels": 1,
        "channels": (4, 8),
        "num_classes": 10,
        "batch_norm": True,
        "activation": "relu",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "pooled_size": 1,
    }


@safe_loading
@pytest.mark.parametrize("make", CLASSIFIERS)
def test_checkpoint_loads_without_arguments(make, tmp_path):
    model = make(num_classes=10, batch_norm=False)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(model, DataLoader(TensorDataset(*images()), batch_size=8))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    inputs, _ = images(seed=1)
    assert_close(loaded.eval()(inputs), model.eval()(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("make", CLASSIFIERS)
def test_state_dict_holds_the_network_alone(make):
    assert all(name.startswith("net.") for name in make().state_dict())


COMMON_ERRORS = [
    ({"num_classes": 1}, "`num_classes` to be an integer of at least 2, but got 1"),
    ({"activation": "relux"}, "`activation` to be one of 'relu', 'gelu', 'tanh', 'sigmoid', but got 'relux'"),
    ({"optimizer": "lion"}, "`optimizer` to be one of 'adam', 'sgd', but got 'lion'"),
    ({"learning_rate": 0.0}, r"`learning_rate` to be a finite number above 0, but got 0\.0"),
]
ERRORS = [
    (MLPClassifier, {"input_size": 0}, "`input_size` to be an integer of at least 1, but got 0"),
    (MLPClassifier, {"hidden_size": 0}, "`hidden_size` to be an integer of at least 1, but got 0"),
    (MLPClassifier, {"num_hidden": -1}, "`num_hidden` to be an integer of at least 0, but got -1"),
    (MLPClassifier, {"num_hidden": 1, "mark_middle": True}, "`num_hidden` .* of at least 2, but got 1"),
    (MLPClassifier, {"weight_decay": -1.0}, r"`weight_decay` to be a .* of at least 0, but got -1\.0"),
    (ConvClassifier, {"in_channels": 0}, "`in_channels` to be an integer of at least 1, but got 0"),
    (ConvClassifier, {"channels": ()}, r"`len\(channels\)` to be .* at least 1, but got 0"),
    (ConvClassifier, {"channels": (4, 0)}, r"`channels\[1\]` to be .* at least 1, but got 0"),
    (ConvClassifier, {"pooled_size": 0}, "`pooled_size` to be an integer of at least 1, but got 0"),
    *((model, *error) for model in (MLPClassifier, ConvClassifier) for error in COMMON_ERRORS),
]


@pytest.mark.parametrize(("model", "options", "message"), ERRORS)
def test_argument_out_of_range_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)
