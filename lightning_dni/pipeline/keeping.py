"""Leave random numbers and buffers as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_dni.core.boundary import device_of


class RandomState:
    """Where the generators of torch (the CPU's and `device`'s), Python and numpy stand."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        self._on_cuda = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Go on from there."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None and self._on_cuda is not None:
            torch.cuda.set_rng_state(self._on_cuda, self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Give all random generators back as they were."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Give `model` the same buffers back, whatever is in them."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give random numbers and the buffers of `model` back as they were."""
    contents = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        with same_randomness(device_of(model)), same_buffers(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):  # else a graph may have saved it
                    buffer.copy_(content)
