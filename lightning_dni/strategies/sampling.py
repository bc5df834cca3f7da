"""Take one batch of the training data, of which the fit that follows sees nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_dni.strategies._compat import CombinedLoader, MisconfigurationException


def one_batch(data: Any) -> Any:
    """A batch as the Trainer makes it of `data`: one loader, or several in lists and dicts.

    Random numbers of the global generators are the caller's to restore.

    Raises:
        MisconfigurationException: There is none, or taking one would use it up.
    """
    flat, structure = pytree.tree_flatten(data.iterables if isinstance(data, CombinedLoader) else data)
    # the user's step may change what it is given
    return copy.deepcopy(pytree.tree_unflatten([_first(loader) for loader in flat], structure))


def _first(loader: Any) -> Any:
    try:
        if isinstance(loader, DataLoader):
            return _first_of_loader(loader)
        twin = _twin(loader)
        iterator = iter(twin)
        if iterator is twin:
            raise _used_up(f"a {type(loader).__name__}, which can be iterated once")
        return next(iterator)
    except StopIteration:
        raise _used_up("no batch") from None


def _twin(loader: Any) -> Any:
    """A copy that keeps count of batches and epochs by itself; what cannot be copied is read as it is."""
    try:
        return copy.copy(loader)
    except TypeError:
        return loader


def _first_of_loader(loader: DataLoader[Any]) -> Any:
    if isinstance(loader.dataset, IterableDataset):
        raise _used_up(f"a {type(loader.dataset).__name__}, an iterable data set")
    with _same_generators(loader):
        if type(loader).__iter__ is not DataLoader.__iter__:
            return next(iter(loader))
        return _fetch(loader)


def _fetch(loader: DataLoader[Any]) -> Any:
    """What the loader's first batch would be, without its workers."""
    data: Any = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(data[next(iter(copy.copy(loader.sampler)))])
    sampler: Any = copy.copy(loader.batch_sampler)
    if type(sampler) is BatchSampler:
        sampler.sampler = copy.copy(sampler.sampler)
    places = next(iter(sampler))
    rows = data.__getitems__(places) if hasattr(data, "__getitems__") else [data[i] for i in places]
    return loader.collate_fn(rows)


@contextmanager
def _same_generators(loader: DataLoader[Any]) -> Iterator[None]:
    """Give the loader's own generators back as they were."""
    owners = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _used_up(what: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"Expected training data of which one batch can be taken beforehand with boundaries='auto', but got "
        f"{what}. Name the boundaries, with DNIPipelineStrategy(boundaries=[...])."
    )
