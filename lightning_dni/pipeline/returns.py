"""What a stage sends to the one below: what its output was worth, and what else is told there."""

from torch import Tensor

from lightning_dni.pipeline.message import Kind, Message, Outlet


class Returns:
    """The way back from one stage.

    Args:
        outlet: The way to the stage below; None where there is none.
        tells: Whether the estimator there asks what the one above predicts.

    Attributes:
        tells: The same.
    """

    def __init__(self, outlet: Outlet | None = None, tells: bool = False) -> None:
        self._outlet, self.tells = outlet, tells

    def send(
        self,
        gradients: tuple[Tensor | None, ...],
        step: int,
        elements_per_row: int | None,
        value: Tensor | None = None,
        output: Tensor | None = None,
        speaks: bool = True,
    ) -> None:
        """Tell the stage below what its output was worth, in this step or an earlier one.

        Args:
            gradients: Those there; empty where it passed nothing on that takes one.
            step: Number of its forward pass.
            elements_per_row: Those of the network's output, where that is known.
            value: What the estimator of this stage predicts, where the one below asks for that.
            output: The network's output, where this stage has that in place of an estimator.
            speaks: Whether this stage has either for that forward pass.
        """
        told = (value, output) if self.tells and speaks else ()
        self._send(gradients and (*gradients, *told), step, elements_per_row)

    def send_true(
        self, gradients: tuple[Tensor | None, ...], step: int, elements_per_row: int | None
    ) -> None:
        """The same of true gradients, which are only measured."""
        self._send(gradients, step, elements_per_row)

    def _send(self, tensors: tuple[Tensor | None, ...], step: int, elements_per_row: int | None) -> None:
        if tensors:
            assert self._outlet is not None
            facts = (float(elements_per_row or 0),)
            self._outlet.send(Message(step, Kind.TRAIN, tensors, facts=facts))
