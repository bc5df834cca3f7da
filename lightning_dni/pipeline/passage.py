"""One batch's way through a stage: the activation that arrives, the user's step on it, what is sent on."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.core.value import differentiable
from lightning_dni.errors import StageError
from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.splitting import StageRunner

T = TypeVar("T")

SAMPLED = 1024
"""About so many elements of a tensor are looked at to tell two batches apart."""

OnOutput = Callable[[list[Tensor], Any], None]
"""Receives the tensors of a stage's output that carry a gradient, and the whole output."""


class Passage:
    """Takes batches through one stage, in order.

    Args:
        runner: Runs the user's step as this stage.
        plan: What crosses which boundary.
        stage: Number of the stage.
        links: The ways to its neighbours.

    Attributes:
        runner: The same.
        received: The tensors of the current batch that came from below and take a gradient.
    """

    def __init__(self, runner: StageRunner, plan: StagePlan, stage: int, links: Links) -> None:
        self.runner, self._plan, self._stage, self._links = runner, plan, stage, links
        self._value: Any = None
        self._fingerprint = 0
        self._sent = False
        self.received: list[Tensor] = []
        self._crossed: list[Tensor] = []
        self._arrived: list[Tensor] = []

    def receive(self, kind: Kind, step: int, batch: Any, before: int = 0) -> None:
        """Wait for what the stage below gives for this batch.

        Args:
            kind: What the batch is for.
            step: Number of the batch among those of its kind.
            batch: The user's batch, which every stage has.
            before: Fingerprint of what the batch was before it was moved to a device.

        Raises:
            StageError: The stage below is at another batch, or has stopped.
        """
        self._fingerprint = fingerprint(batch, before)
        self._value, self.received, self._sent = None, [], False
        self._crossed, self._arrived = [], []
        if self._links.activation_in is None:
            return
        message = self._links.activation_in.receive()
        self._check(message, kind, step)
        carries = int(message.facts[0])
        leaves: list[Tensor] = []
        for i, tensor in enumerate(message.tensors):
            assert tensor is not None
            leaf = tensor.requires_grad_() if kind is Kind.TRAIN and carries >> i & 1 else tensor
            leaves.append(leaf)
        self.received = [leaf for leaf in leaves if leaf.requires_grad]
        crossing = self._plan.crossing[self._plan.boundaries[self._stage - 1]]
        own = len(crossing.leaves)
        self._crossed, self._arrived = leaves[:own], leaves[own:]
        self._value = crossing.unpack(self._crossed)

    def _check(self, message: Message, kind: Kind, step: int) -> None:
        below, here = f"stage {self._stage - 1}", f"stage {self._stage}"
        if message.kind is Kind.MEET:
            raise StageError(
                f"Expected {below} to be at the batch at which {here} is ({kind.name.lower()} batch {step}), "
                "but it has no such batch: it waits for all stages. Give every process the same number of "
                "batches, and do on every rank, at the same batch, whatever waits for all of them: saving a "
                "checkpoint, `trainer.log_dir`, ending an epoch by returning -1."
            )
        if (message.kind, message.step) != (kind, step):
            raise StageError(
                f"Expected {below} to be at the batch at which {here} is ({kind.name.lower()} batch {step}), "
                f"but got {message.kind.name.lower()} batch {message.step}. Give every process the same "
                "number of batches in the same order."
            )
        if self._fingerprint and message.fingerprint and self._fingerprint != message.fingerprint:
            raise StageError(
                f"Expected {below} and {here} to read the same batch, but {kind.name.lower()} batch {step} "
                "differs between them. Give every process the same data in the same order, with the same "
                "augmentation: a map-style data set under Lightning's own sampler, one seed on every process."
            )

    def run(
        self,
        step: Callable[[], T],
        kind: Kind,
        number: int,
        on_output: OnOutput | None = None,
        on_receive: Callable[[], None] | None = None,
    ) -> T | None:
        """Run the user's step as this stage; None where the stage is not the last one.

        Args:
            step: The user's step.
            kind: What the batch is for.
            number: Number of the batch among those of its kind.
            on_output: Called when the stage's output has been sent.
            on_receive: Called when the step takes what has come from below.

        Raises:
            StageError: The step ended without coming to the stage's boundary.
        """

        def emit(output: Any) -> None:
            self._send(output, kind, number, on_output)

        def receive() -> Any:
            if on_receive is not None:
                on_receive()
            return self._value

        first, last = self._links.activation_in is None, self._links.activation_out is None
        ends = None if first else receive, None if last else emit
        result = self.runner.run(step, *ends, self._crossed, self._arrived)
        self._value, self._crossed, self._arrived = None, [], []
        if not last and not self._sent:
            raise StageError(
                f"Expected the step to run boundary {self._plan.boundaries[self._stage]!r}, but it ended "
                "without. Call the module itself, in every step, or leave it out of `boundaries`."
            )
        return result

    def _send(self, output: Any, kind: Kind, step: int, on_output: OnOutput | None) -> None:
        boundary = self._plan.boundaries[self._stage]
        tensors = (*self._plan.crossing[boundary].pack(output), *self.runner.onward())
        carriers = [tensors[i] for i in differentiable(list(tensors), boundary)]
        carries = sum(1 << i for i, x in enumerate(tensors) if x.requires_grad)
        sent = tuple(map(_to_send, tensors))
        self._sent = True
        assert self._links.activation_out is not None
        self._links.activation_out.send(Message(step, kind, sent, self._fingerprint, (float(carries),)))
        if on_output is not None:
            on_output(carriers, output)


def _to_send(tensor: Tensor) -> Tensor:
    """What no later step changes, though the message may still be under way then."""
    sent = tensor.detach().contiguous()
    origin = tensor if tensor._base is None else tensor._base
    # a buffer, a parameter, or a part of one; what has a graph of its own was made in this step
    return sent.clone() if origin.is_leaf and sent.data_ptr() == tensor.data_ptr() else sent


def fingerprint(batch: Any, before: int = 0) -> int:
    """A number of what is on the CPU in a batch, of large tensors a part spread over all rows; 0 for nothing.

    `before` is that of another batch, which it goes on from.

    >>> fingerprint(torch.arange(3)) == fingerprint(torch.arange(3)) != fingerprint(torch.arange(4))
    True
    """
    seen = before
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.numel():
            seen = zlib.crc32(_sample(leaf), zlib.crc32(repr(tuple(leaf.shape)).encode(), seen))
        elif isinstance(leaf, (int, float, str, bytes)):
            seen = zlib.crc32(repr(leaf).encode(), seen)
    return seen


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    step = flat.numel() // SAMPLED | 1  # odd, so that it does not fall on one column of every row
    return flat[::step].contiguous().view(torch.uint8).numpy().tobytes()
