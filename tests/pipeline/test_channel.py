"""What one process sends is what the other receives: every bit, in order, and never too much at once."""

import torch
from processes import on_ranks

from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.header import DTYPES
from lightning_dni.pipeline.message import Kind, Message


def of_every_dtype(seed):
    """Random bits as every dtype there is, so also NaN with payload, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    for dtype in DTYPES:
        if dtype == torch.bool:
            yield torch.rand(6, generator=generator) > 0.5
        else:
            bits = torch.randint(256, (6 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
            yield bits.view(dtype).view(2, 3)


def bits(tensor):
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a is b if a is None or b is None else bits(a).equal(bits(b))


def messages():
    """Messages of all sorts, the same in every process."""
    torch.manual_seed(0)
    found = [Message(k, Kind.TRAIN, (t, None)) for k, t in enumerate(of_every_dtype(1))]
    odd = [
        (),
        (None,),
        (torch.randn(0, 5),),
        (torch.tensor(3.5),),
        (torch.randn(4, 3).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        (torch.randn(6, 8)[::2, ::3], torch.randn(3, 1).expand(3, 4)),
        (torch.randn(2, dtype=torch.complex64).conj(), torch.randn(5, requires_grad=True) * 2),
    ]
    found += [Message(k, Kind.EVALUATE, t, -k, (0.1 * k, float("inf"))) for k, t in enumerate(odd)]
    found += [Message(2**40 + n, Kind.TRAIN, (torch.randn(n, 7),), 2**63 - 1) for n in (5, 2, 9, 1)]
    return found


def told(message):
    """All of a message but its bytes."""
    strides = [t is not None and (t.shape, t.dtype) for t in message.tensors]
    return message.step, message.kind, message.fingerprint, message.facts, strides


def round_trip(rank):
    """Rank 0 sends, rank 1 sends back; how many came back as they were."""
    links = connect([[0], [1]])
    right = 0
    for message in messages():
        if rank == 0:
            links.activation_out.send(message)
            back = links.gradient_in.receive()
            assert told(back) == told(message)
            right += all(map(same, back.tensors, message.tensors))
        else:
            links.gradient_out.send(links.activation_in.receive())
    close(links)
    return right


def test_every_bit_arrives():
    assert on_ranks(round_trip) == [len(messages()), 0]
