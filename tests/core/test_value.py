"""What a module returns is opened into tensors, and put together as it was."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from versions import newer_torch

from lightning_dni.core.value import close_value, differentiable, open_value
from lightning_dni.errors import BoundaryError

Pair = namedtuple("Pair", ["a", "b"])
A, B = torch.zeros(2, 3, requires_grad=True), torch.ones(2, dtype=torch.long)
VALUES = [
    A,
    (A, B),
    [A, (B, None)],
    {"a": A, "b": [B, 1, "s", 2.0, True, torch.float32]},
    OrderedDict(b=B, a=A),
    Pair(A, B),
    pytest.param(pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), marks=newer_torch),
    (),
    None,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_what_is_opened_closes_again(value):
    again = close_value(*open_value("b", value))
    assert type(again) is type(value)
    assert repr(again) == repr(value)


@pytest.mark.parametrize("opaque", [object(), {1, 2}, iter([A]), lambda: A])
def test_what_a_tensor_could_hide_in_is_refused(opaque):
    with pytest.raises(BoundaryError, match=rf"boundary 'b'.*got {type(opaque).__name__} in it.*register"):
        open_value("b", (A, opaque))


def test_only_what_carries_a_gradient_is_cut():
    assert differentiable([B, A, 1, A.detach(), None, A * 2], "b") == [1, 5]


def test_a_complex_tensor_may_pass_but_not_carry_a_gradient():
    z = torch.complex(A, A)
    assert differentiable([A, z.detach()], "b") == [0]
    with pytest.raises(BoundaryError, match=r"real activations at boundary 'b', but got torch\.complex64"):
        differentiable([A, z], "b")
