"""Leave random numbers, buffers and attributes as they were."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Attributes:
    """What the modules of a model hold beside parameters, buffers and submodules, and what is in it."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, _attributes(module)) for module in model.modules()]
        values = [value for _, held in self._held for value in held.values()]
        self._lists = [(value, list(value)) for value in values if type(value) is list]
        self._dicts = [(value, dict(value)) for value in values if type(value) is dict]
        self._tensors = _contents(value for value in values if type(value) is Tensor)  # no placeholder

    def restore(self, afresh: bool = False) -> None:
        """Put them back; `afresh` gives copies in place of tensors, which a graph may have saved."""
        for module, held in self._held:
            for name in _attributes(module).keys() - held.keys():
                del vars(module)[name]
            vars(module).update(held)
        for values, content in self._lists:
            values[:] = content
        for entries, kept in self._dicts:
            entries.clear()
            entries.update(kept)
        if not afresh:
            _put_back(self._tensors)
            return
        copies = {id(tensor): content.clone() for tensor, content in self._tensors}
        for module, held in self._held:
            vars(module).update({n: copies[id(value)] for n, value in held.items() if id(value) in copies})


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give random numbers, and the buffers and attributes of `model`, back as they were."""
    attributes = Attributes(model)
    contents = _contents(model.buffers())
    try:
        with same_randomness(device_of(model)), same_buffers(model):
            yield
    finally:
        attributes.restore()
        _put_back(contents)


def _contents(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]


def _put_back(contents: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, content in contents:
            if not torch.equal(tensor, content):  # else a graph may have saved it
                tensor.copy_(content)
