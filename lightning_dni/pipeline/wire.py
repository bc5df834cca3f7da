"""One direction between two processes, as torch.distributed carries it."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dni.pipeline.header import WORDS, Header, Layout, Route, decode, encode, flatten
from lightning_dni.pipeline.message import Message

FOREVER = timedelta(days=365)
"""How long to wait where a slow stage must not be taken for a dead one; the watch finds the dead ones."""

_IN_TURN, _POSTED, _NEVER = range(3)
"""Tags: what is received after its header, what buffers are posted for ahead, and nothing."""


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
        self._ahead: tuple[int, ...] = ()
        self._last: tuple[int, ...] = ()
        self._posted: list[tuple[Tensor, dist.Work]] = []
        # waiting for a transfer on the stream that computes would make the computing wait
        on_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_cuda else None  # type: ignore[no-untyped-call]

    # ---- sending

    def post(self, header: Header, message: Message | None = None) -> Parcel:
        """Start to send; the header tells about `message` what the other end has to know."""
        flat = [None if t is None else flatten(t) for t in (message.tensors if message else ())]
        full = [f for f in flat if f is not None and f[0].nbytes]
        through_host = [f.cpu() for layout, f in full if self._is_through_host(layout)]
        sizes = tuple(map(len, through_host))
        route = self._route(sizes)
        words = encode(header._replace(layouts=tuple(f and f[0] for f in flat), route=route))
        sent = [(words, self._control, _IN_TURN)]
        sent += [(t, self._control, _POSTED if route == Route.POSTED else _IN_TURN) for t in through_host]
        if self._data is not None:
            sent += [(f, self._data, _IN_TURN) for layout, f in full if not self._is_through_host(layout)]
        if route == Route.ADAPTED:
            # what is posted already cannot be taken back
            sent += [(torch.empty(n, dtype=torch.uint8), self._control, _POSTED) for n in self._ahead]
            self._ahead = sizes
        self._last = sizes
        # not dist.isend: the group has to serve to the end, also where the default group is gone already
        return Parcel([g.send([t], self._at, tag) for t, g, tag in sent], [t for t, _, _ in sent])

    def _route(self, sizes: tuple[int, ...]) -> Route:
        if not sizes:
            return Route.PAST
        if sizes == self._ahead:
            return Route.POSTED
        return Route.ADAPTED if sizes == self._last or not self._ahead else Route.PAST

    def _is_through_host(self, layout: Layout) -> bool:
        return layout.on_host or self._data is None

    def finish(self, parcel: Parcel) -> None:
        """Wait until a message has been sent; its tensors are free then."""
        with torch.cuda.stream(self._stream):
            for work in parcel.works:
                work.wait(FOREVER)
        if self._stream is not None:
            self._stream.synchronize()

    # ---- receiving

    def take_header(self) -> Header:
        """Wait for the next header, and be ready for its tensors."""
        words = torch.empty(WORDS, dtype=torch.int64)
        coming = self._control.recv([words], self._at, _IN_TURN)
        if not self._posted:
            buffers = [torch.empty(n, dtype=torch.uint8) for n in self._ahead]
            self._posted = [(b, self._control.recv([b], self._at, _POSTED)) for b in buffers]
        coming.wait(FOREVER)
        return decode(words)

    def take_tensors(self, header: Header) -> tuple[Tensor | None, ...]:
        """Wait for the tensors of a header."""
        posted = self._take_posted() if header.route == Route.POSTED else []
        with torch.cuda.stream(self._stream):
            flat = [self._take(layout, posted) for layout in header.layouts]
            tensors = tuple(self._restore(f, layout) for f, layout in zip(flat, header.layouts, strict=True))
        if self._stream is not None:
            self._stream.synchronize()
        if header.route == Route.ADAPTED:
            self._take_posted()
            hosted = [x for x in header.layouts if x is not None and self._is_through_host(x)]
            self._ahead = tuple(x.nbytes for x in hosted if x.nbytes)
        return tensors

    def _take_posted(self) -> list[Tensor]:
        for _, work in self._posted:
            work.wait(FOREVER)
        buffers = [buffer for buffer, _ in self._posted]
        self._posted = []
        return buffers

    def _take(self, layout: Layout | None, posted: list[Tensor]) -> Tensor | None:
        """Bytes of one tensor, in the order in which they were sent."""
        if layout is None:
            return None
        through_host = self._is_through_host(layout)
        if through_host and layout.nbytes and posted:
            return posted.pop(0)
        flat = torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu" if through_host else self._device)
        group = self._control if through_host else self._data
        if layout.nbytes and group is not None:
            group.recv([flat], self._at, _IN_TURN).wait(FOREVER)
        return flat

    def _restore(self, flat: Tensor | None, layout: Layout | None) -> Tensor | None:
        if flat is None or layout is None:
            return None
        return layout.restore(flat if layout.on_host else flat.to(self._device))

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
        if self._data is not None and hasattr(self._data, "abort"):  # torch 2.4 has no such call
            self._data.abort()

    def cut(self) -> None:
        """Give up the groups, if nobody has done so before."""
        for group in (self._data, self._control):
            if group is not None and dist.is_initialized():
                with suppress(ValueError):  # destroyed together with the default group
                    dist.destroy_process_group(group)
