"""Random streams of our own, so that the global generator is never drawn from and never reseeded."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *labels: object) -> int:
    """A seed for the stream named by `labels`, the same on every machine.

    >>> derive_seed(0, "net.3") == derive_seed(0, "net.3") != derive_seed(1, "net.3")
    True
    """
    digest = hashlib.blake2b(repr((seed, *labels)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`.

    As torch.manual_seed, which does it for every kind of device, and puts down where it was called from for
    those that nobody uses: that takes a millisecond.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block under `seed`; afterwards the generators of the CPU and of `device` are as before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, device)
        yield


class RandomStream:
    """A stream that goes on where it stopped: `with stream:` draws from it, not from the global one."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        with seeded(seed, device):
            self._own = self._capture()
        self._global = self._own

    def __enter__(self) -> None:
        self._global = self._capture()
        self._install(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._capture()
        self._install(self._global)

    def _capture(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        return states if self._cuda is None else [*states, torch.cuda.get_rng_state(self._cuda)]

    def _install(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._cuda is not None:
            torch.cuda.set_rng_state(states[1], self._cuda)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The stream's position."""
        return {str(i): state.clone() for i, state in enumerate(self._own)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a saved position (the CPU's alone where the saved run had no such device)."""
        own = [state[str(i)] for i in range(len(state))]
        self._own = (own + self._own[len(own) :])[: len(self._own)]
