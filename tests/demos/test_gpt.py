"""The GPT sees only what came before, and has the parameters that were counted by hand."""

import jsonargparse
import pytest
import torch
from fits import quiet_trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dni.demos import GPT, GPTLanguageModel
from lightning_dni.demos.gpt import CausalSelfAttention

SMALL = {"vocabulary": 7, "context_length": 6, "width": 8, "heads": 2, "layers": 2}


def test_parameters_are_those_counted_by_hand():
    tokens, positions = 7 * 8, 6 * 8
    attention = (8 * 24 + 24) + (8 * 8 + 8)
    mlp = (8 * 32 + 32) + (32 * 8 + 8)
    norm, head = 2 * 8, 8 * 7
    by_hand = tokens + positions + 2 * (attention + mlp + 2 * norm) + norm + head
    assert sum(p.numel() for p in GPT(**SMALL).parameters()) == by_hand == 1920


def test_every_block_keeps_the_shape():
    net = GPT(**SMALL)
    h = torch.zeros(3, 5, dtype=torch.long)
    shapes = {name: tuple((h := block(h)).shape) for name, block in net.named_children()}
    assert shapes == {"embedding": (3, 5, 8), "block_0": (3, 5, 8), "block_1": (3, 5, 8), "head": (3, 5, 7)}


@pytest.mark.parametrize("changed", range(6))
def test_a_later_token_changes_no_earlier_output(changed):
    net = GPT(**SMALL).eval()
    tokens = torch.randint(7, (2, 6))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 7
    before, after = net(tokens), net(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(2).all()


def test_attention_is_the_softmax_of_what_came_before():
    layer, h = CausalSelfAttention(8, 2, 0.5).double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    heads = []
    for q, k, v in zip(*(p.split(4, 2) for p in layer.query_key_value(h).split(8, 2)), strict=True):
        scores = (q @ k.mT) / 4**0.5
        scores[:, torch.ones(5, 5).triu(1).bool()] = -torch.inf
        heads.append(scores.softmax(2) @ v)
    torch.testing.assert_close(layer(h), layer.out(torch.cat(heads, 2)), rtol=0, atol=1e-14)


def test_dropout_is_off_in_eval_mode_only():
    net, tokens = GPT(**SMALL, dropout=0.5), torch.zeros(2, 6, dtype=torch.long)
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


def test_attention_drops_too():
    layer, h = CausalSelfAttention(8, 2, 0.5), torch.randn(2, 6, 8)
    assert not torch.equal(layer(h), layer(h))


@pytest.mark.parametrize("wrong", [*((name, 0) for name in SMALL), ("dropout", 1.0)])
def test_arguments_are_refused_by_name(wrong):
    name, value = wrong
    with pytest.raises(ValueError, match=f"Expected `{name}`"):
        GPTLanguageModel(**{name: value})


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="`width` to be a multiple of heads=3, but got 8"):
        GPT(width=8, heads=3)


def test_the_loss_is_that_of_the_next_token():
    text = torch.randint(7, (4, 7))
    model = GPTLanguageModel(**SMALL, dropout=0.0)
    trainer = quiet_trainer(max_steps=1)
    scores = model(text[:, :-1]).detach()
    trainer.fit(model, DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), 4))
    each = [F.cross_entropy(scores[:, t], text[:, t + 1]) for t in range(6)]
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], torch.stack(each).mean())


def test_it_learns_to_count():
    text = torch.stack([(torch.arange(7) + i) % 7 for i in range(7)])
    data = DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), 7)
    model = GPTLanguageModel(**SMALL, dropout=0.0, learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=60)
    trainer.fit(model, data, data)
    assert trainer.callback_metrics["val_loss"] < 0.1


def test_a_recipe_may_name_every_argument_of_the_net():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GPTLanguageModel, "model")
    given = parser.parse_args([f"--model.{name}={value}" for name, value in SMALL.items()])
    assert sum(p.numel() for p in GPTLanguageModel(**given.model).net.parameters()) == 1920
    with pytest.raises(jsonargparse.ArgumentError, match="hieght"):
        parser.parse_args(["--model.hieght=3"])
