"""One direction between two processes, as torch.distributed carries it."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dni.pipeline.header import WORDS, Header, Layout, decode, encode, flatten
from lightning_dni.pipeline.message import Message

FOREVER = timedelta(days=365)
"""How long to wait where a slow stage must not be taken for a dead one; the watch finds the dead ones."""

_NEVER = 1
"""A tag that nobody sends with."""


class Parcel(NamedTuple):
    """A message under way.

    Attributes:
        works: Its transfers. Dropping one cancels it; a second `wait()` on one never returns.
        tensors: What they read.
    """

    works: Sequence[dist.Work]
    tensors: Sequence[Tensor]


class Wire:
    """Headers and the tensors of the CPU go through gloo, those of an accelerator through its backend.

    Args:
        peer: Global rank at the other end.
        control: Group of the two ranks on gloo.
        data: The same on the accelerator's backend; None to copy its tensors through the CPU.
        device: Where tensors of the accelerator are put.
    """

    def __init__(
        self,
        peer: int,
        control: dist.ProcessGroup,
        data: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.peer = peer
        self._at = dist.get_group_rank(control, peer)
        self._control, self._data = control, data
        self._device = device or torch.device("cpu")
        # waiting for a transfer on the stream that computes would make the computing wait
        on_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]

    # ---- sending

    def post(self, header: Header, message: Message | None = None) -> Parcel:
        """Start to send; the header tells about `message` what the other end has to know."""
        flat = [None if t is None else flatten(t) for t in (message.tensors if message else ())]
        words = encode(header._replace(layouts=tuple(f and f[0] for f in flat)))
        full = [self._on_its_way(*f) for f in flat if f is not None and f[0].nbytes]
        groups = [self._control, *(group for group, _ in full)]
        tensors = [words, *(tensor for _, tensor in full)]
        # not dist.isend: the group has to serve to the end, also where the default group is gone already
        works = [group.send([t], self._at, 0) for t, group in zip(tensors, groups, strict=True)]
        return Parcel(works, tensors)

    def _on_its_way(self, layout: Layout, flat: Tensor) -> tuple[dist.ProcessGroup, Tensor]:
        if layout.on_host:
            return self._control, flat
        return (self._control, flat.cpu()) if self._data is None else (self._data, flat)

    def finish(self, parcel: Parcel) -> None:
        """Wait until a message has been sent; its tensors are free then."""
        with torch.cuda.stream(self._stream):
            for work in parcel.works:
                work.wait(FOREVER)
        if self._stream is not None:
            self._stream.synchronize()

    # ---- receiving

    def take_header(self) -> Header:
        """Wait for the next header."""
        words = torch.empty(WORDS, dtype=torch.int64)
        self._wait(words, self._control)
        return decode(words)

    def take_tensors(self, header: Header) -> tuple[Tensor | None, ...]:
        """Wait for the tensors of a header."""
        with torch.cuda.stream(self._stream):
            tensors = tuple(None if layout is None else self._take(layout) for layout in header.layouts)
        if self._stream is not None:
            self._stream.synchronize()
        return tensors

    def _take(self, layout: Layout) -> Tensor:
        through_host = layout.on_host or self._data is None
        flat = torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu" if through_host else self._device)
        if layout.nbytes:
            self._wait(flat, self._control if through_host else self._data)
        return layout.restore(flat if layout.on_host else flat.to(self._device))

    def _wait(self, buffer: Tensor, group: dist.ProcessGroup | None) -> None:
        assert group is not None
        group.recv([buffer], self._at, 0).wait(FOREVER)

    def adopt(self, tensors: Sequence[Tensor | None]) -> None:
        """Tell the allocator that the stream that computes now uses what has come."""
        if self._stream is not None:
            for tensor in tensors:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(self._device))

    # ---- the end

    def sever(self) -> None:
        """End the connection, so that whoever waits for it gets an error now."""
        # there is no call for it, but a wait that runs out of time closes the connection for all
        with suppress(RuntimeError):
            self._control.recv([torch.empty(1)], self._at, _NEVER).wait(timedelta(milliseconds=1))
        if self._data is not None:
            self._data.abort()

    def cut(self) -> None:
        """Give up the groups, if nobody has done so before."""
        for group in (self._data, self._control):
            if group is not None and dist.is_initialized():
                with suppress(ValueError):  # destroyed together with the default group
                    dist.destroy_process_group(group)
