"""What one process sends is what the other receives: every bit, in order, and never too much at once."""

import gc
import threading
import time

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks

from lightning_dni.errors import StageError
from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.header import DTYPES, Route
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


def small(step, of=0.0):
    return Message(step, Kind.TRAIN, (torch.full((3,), of + step),))


def both_ways(rank, steps):
    """Each sends and receives as fast as it can, so that either is ahead at times."""
    links = connect([[0], [1]], window=2)
    outlet = links.activation_out or links.gradient_out
    inlet = links.gradient_in or links.activation_in
    for step in range(steps):
        outlet.send(small(step, 1000.0 * rank))
        got = inlet.receive()
        assert got.step == step
        assert got.tensors[0].eq(1000.0 * (1 - rank) + step).all()
    close(links)
    return outlet._thread.is_alive() or inlet._thread.is_alive()


def test_a_thousand_messages_cross_in_both_directions_at_once():
    assert on_ranks(both_ways, 1000) == [False, False]


def changing(seed):
    """Messages whose sizes stay, change for once, or change for good."""
    torch.manual_seed(seed)
    kinds = [(7,), (7, 30), (64,), (), (None,), (30, None, 7), (0, 64)]
    for step in range(200):
        if step % int(torch.randint(1, 6, ())) == 0:
            sizes = kinds[int(torch.randint(len(kinds), ()))]
        yield Message(step, Kind.TRAIN, tuple(n if n is None else torch.randn(n) for n in sizes))


def change(rank, seed):
    links = connect([[0], [1]], window=3)
    routes = set()
    for message in changing(seed):
        if rank == 0:
            links.activation_out.send(message)
            routes.add(links.activation_out._wire._route((28,)))
        else:
            got = links.activation_in.receive()
            assert got.step == message.step
            assert len(got.tensors) == len(message.tensors)
            assert all(map(same, got.tensors, message.tensors))
    close(links)
    return sorted(routes)


@pytest.mark.parametrize("seed", range(2))
def test_sizes_may_change_whenever_they_like(seed):
    routes, _ = on_ranks(change, seed)
    assert routes == list(Route)  # each of the ways to receive was in use


def live_tensors(size):
    """How many storages of so many bytes there are."""
    found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    tensors = [t for t in found if t.layout == torch.strided and not t.is_meta]
    return len({t.data_ptr() for t in tensors if t.untyped_storage().nbytes() == size})


def ahead(rank, window, size):
    """Rank 0 sends as fast as it may while rank 1 takes nothing; then rank 1 takes everything."""
    links = connect([[0], [1]], window=window)
    if rank == 0:
        sent = []

        def send_all():
            for step in range(20):
                links.activation_out.send(Message(step, Kind.TRAIN, (torch.full((size,), step).byte(),)))
                sent.append(step)

        sender = threading.Thread(target=send_all)
        sender.start()
        time.sleep(1.0)
        dist.barrier()
        seen = len(sent), live_tensors(size)
        dist.barrier()
        sender.join()
    else:
        dist.barrier()
        seen = links.activation_in._arrived.qsize(), live_tensors(size)
        dist.barrier()
        for step in range(20):
            assert links.activation_in.receive().tensors[0].eq(step).all()
    close(links)
    return seen


@pytest.mark.parametrize("window", [1, 3])
def test_a_fast_sender_is_held_back(window):
    (sent, held), (waiting, kept) = on_ranks(ahead, window, 54321)
    assert waiting == window  # the receiver is full,
    assert sent == 2 * window  # so is the sender,
    assert held <= window + 1  # which has in memory what is under way and the one that it cannot send
    assert kept <= window


def four_stages(rank):
    """Activations go up through all stages and gradients down, in two copies of the pipeline or one."""
    ranks = [[3], [2], [1], [0]]
    links = connect(ranks, with_output=True)
    stage = 3 - rank
    for step in range(50):
        m = links.activation_in.receive() if links.activation_in else Message(step, Kind(step % 2), (None,))
        assert (m.step, m.kind, len(m.facts)) == (step, step % 2, stage)
        up = Message(step, m.kind, (torch.full((step % 3, 2), stage),), facts=(*m.facts, stage + 0.5))
        if links.activation_out:
            links.activation_out.send(up)
            g, out = links.gradient_in.receive(), links.output_in.receive()
            assert (g.step, g.kind, out.step) == (step, m.kind, step)
        else:
            assert m.facts == (0.5, 1.5, 2.5)
            g = out = up
        if links.gradient_out:
            links.gradient_out.send(g)
            links.output_out.send(out)
    close(links)
    return [end is None for end in links]


def test_four_stages_in_a_row():
    bottom, *middle, top = on_ranks(four_stages, world_size=4)[::-1]
    assert middle == [[False] * 6] * 2
    assert bottom == [True, False, False, True, False, True]
    assert top == [False, True, True, False, True, False]


def two_copies(rank):
    """Two copies of two stages; each message tells whence it comes."""
    links = connect([[0, 2], [3, 1]])
    if links.activation_out:
        links.activation_out.send(Message(rank, Kind.TRAIN))
        found = links.gradient_in.receive().step
    else:
        found = links.activation_in.receive().step
        links.gradient_out.send(Message(rank, Kind.TRAIN))
    close(links)
    return found


def test_copies_of_the_pipeline_do_not_mix():
    assert on_ranks(two_copies, world_size=4) == [3, 2, 1, 0]


def ends_early(rank):
    links = connect([[0], [1]])
    if rank == 0:
        links.activation_out.send(small(0))
        close(links)
        with pytest.raises(
            StageError, match=r"Expected an open way for activations to stage 1 \(rank 1\), but"
        ):
            links.activation_out.send(small(1))
    else:
        assert links.activation_in.receive().step == 0
        for _ in range(2):
            with pytest.raises(
                StageError, match=r"Expected more activations from stage 0 .*same number of batches"
            ):
                links.activation_in.receive()
        close(links)
    close(links)
    return [t.name for t in threading.enumerate() if t.name.startswith("dni")]


def test_a_stage_that_ends_early_is_named():
    assert on_ranks(ends_early) == [[], []]


def fails(rank):
    links = connect([[0], [1]])
    dist.barrier()
    if rank == 0:
        close(links, failed=True)
        return None
    with pytest.raises(
        StageError, match=r"No more activations from stage 0 \(rank 0\): that stage has failed"
    ):
        links.activation_in.receive()
    start = time.monotonic()
    close(links, failed=True)
    return time.monotonic() - start


def test_a_stage_that_fails_says_so():
    assert on_ranks(fails)[1] < 3


def closes_alone(rank):
    """Rank 1 never closes: rank 0 does not wait for it for ever, and no thread is left."""
    links = connect([[0], [1]])
    dist.barrier()
    if rank == 1:
        time.sleep(3)
        return None
    start = time.monotonic()
    close(links, seconds=1.0)
    return time.monotonic() - start, [t.name for t in threading.enumerate() if t.name.startswith("dni")]


def test_closing_is_bounded_in_time():
    (seconds, left), _ = on_ranks(closes_alone)
    assert seconds < 3.5
    assert left == []


def sends_what_cannot_travel(rank):
    links = connect([[0], [1]], window=1)
    if rank == 0:
        for _ in range(3):  # more than the window: what is refused does not count
            with pytest.raises(StageError, match="dense tensors"):
                links.activation_out.send(Message(0, Kind.TRAIN, (torch.eye(3).to_sparse(),)))
        links.activation_out.send(small(7))
    else:
        assert links.activation_in.receive().step == 7
    close(links)


def test_a_refused_message_leaves_the_way_open():
    on_ranks(sends_what_cannot_travel)


def connect_wrongly(rank):
    dist.barrier()  # else one has ended before the other has reached it
    with pytest.raises(StageError, match=rf"ranks: expected rank {rank} once, got \[\[0\], \[0\]\]"):
        connect([[0], [0]])


def test_each_rank_has_one_stage():
    on_ranks(connect_wrongly)
