"""The network's output on the last stage, and the gradient there: what estimators below are told of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dni.core.cut import refuse_changed
from lightning_dni.core.target import other_elements
from lightning_dni.errors import EstimatorError
from lightning_dni.pipeline.message import Kind, Message, Outlet


class Output:
    """What the last stage sees of the network's output in one step, and sends down after its backward pass.

    Args:
        outlet: The way to the stage below; None where nobody below is to be told.
        with_gradient: Whether the gradient of the loss goes along.
        with_value: Whether anybody may ask for the output itself.
    """

    def __init__(
        self, outlet: Outlet | None = None, with_gradient: bool = False, with_value: bool = True
    ) -> None:
        self._outlet, self._with_gradient = outlet, with_gradient and outlet is not None
        self._with_value = with_value
        self._seen: Tensor | None = None
        self._version = 0
        self._gradients: list[Tensor] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._seen, self._gradients = None, []

    def see(self, output: Any, before: int | None = None) -> int | None:
        """Take note of what the output module gives; its elements per row, if it takes a gradient.

        Args:
            output: What it gives.
            before: By how many elements per row the stages below divide; None where they do not.

        Raises:
            EstimatorError: There are more or fewer.
        """
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not torch.is_grad_enabled() or not tensors or not tensors[0].ndim:
            return None
        self._seen, self._version = tensors[0].detach(), tensors[0]._version
        if self._with_gradient:
            tensors[0].register_hook(self._gradients.append)  # type: ignore[no-untyped-call]
        elements = self._seen.numel() // max(1, self._seen.shape[0])
        if elements and before not in (None, elements):  # a batch without rows tells nothing
            raise other_elements("the estimators of the stages below", before, elements)
        return elements

    def told(self) -> Tensor:
        """What the output module has given.

        Raises:
            EstimatorError: It did not run, or that was changed since.
        """
        if self._seen is None:
            raise EstimatorError(
                "Expected the network's output for the estimators of the stages below, but the output module "
                "did not run. Pass `output=` the name of the submodule whose output is the network's output; "
                "where no estimator asks for it, its class or a partial of it in place of a function."
            )
        if self._with_value:
            refuse_changed(self._seen, self._version, "the estimators of the stages below")
        return self._seen.contiguous()

    def send(self, step: int) -> None:
        """Tell the stage below, once the loss has been differentiated.

        Raises:
            EstimatorError: The output module did not run, its output was changed since, or what is made of it
                is not the loss alone.
        """
        if self._outlet is None:
            return
        told = [self.told()]
        if self._with_gradient:
            if len(self._gradients) != 1:
                raise EstimatorError(
                    "Expected one gradient at the network's output for the estimators of the stages below, "
                    f"but got {len(self._gradients)} in one backward pass. Pass `output=` the name of a "
                    "submodule that runs once and of whose output the loss is computed."
                )
            told.append(self._gradients[0].detach().contiguous())
        self._outlet.send(Message(step, Kind.TRAIN, tuple(told)))
        self.begin()
