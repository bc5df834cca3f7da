"""Sums over the processes of a data-parallel run."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor


class Replicas:
    """The processes that train on rows of the same batch; all of them have to ask for the same sums.

    Args:
        strategy: Reduces tensors over the processes.
        module: The module, whose parameters are the same in all of them.
    """

    def __init__(self, strategy: pl.strategies.Strategy, module: pl.LightningModule) -> None:
        self._strategy = strategy
        self._parameters = dict(module.named_parameters())

    @property
    def device(self) -> torch.device:
        """Where what is summed has to be."""
        return self._strategy.root_device

    def total(self, value: Tensor) -> Tensor:
        """The sum of every process's `value`."""
        # a copy: some backends reduce in place
        total = self._strategy.reduce(value.clone(), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def totals(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of every process's gradient by parameter, of which each may lack some."""
        here = torch.tensor([float(name in gradients) for name in self._parameters], device=self.device)
        anywhere = self.total(here).tolist()
        found = {}
        for (name, parameter), count in zip(self._parameters.items(), anywhere, strict=True):
            if count:
                gradient = gradients.get(name, torch.zeros_like(parameter, requires_grad=False))
                found[name] = self.total(gradient.to(torch.promote_types(gradient.dtype, torch.float32)))
        return found
