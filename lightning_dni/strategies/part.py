"""A strategy whose devices each take a part of the module: what a stage holds, once that is known."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.residence import bring_part, on_device
from lightning_dni.strategies._compat import say_device
from lightning_dni.strategies.bucket import broadcast
from lightning_dni.strategies.refusals import refuse_nodes_apart

BOTH = "cpu:gloo,cuda:nccl"
"""The processes tell each other also what is on the CPU, which NCCL alone would not take."""


class PartOnDevice(DDPStrategy):
    """Leaves the module on the CPU, and brings to an accelerator what its process holds."""

    @property
    def _holds_a_part(self) -> bool:
        """Whether the device of this process takes no more of the module than its stage."""
        return self.root_device.type != "cpu"

    @override
    def setup_environment(self) -> None:
        """Find the other processes, unless nobody says where they are."""
        refuse_nodes_apart(self.num_nodes, self.cluster_environment)
        if self.root_device.type == "cuda" and self._process_group_backend in (None, "nccl"):
            self._process_group_backend = BOTH
        super().setup_environment()

    @override
    def model_to_device(self) -> None:
        """Leave the module where it is until a batch has shown what of it belongs to this stage."""
        assert self.lightning_module is not None
        if self._holds_a_part:
            say_device(self.lightning_module, self.root_device)
        else:
            super().model_to_device()

    @override
    def configure_ddp(self) -> None:
        """Give the module rank 0's parameters and buffers; no wrapper."""
        assert self.lightning_module is not None
        broadcast([*self.lightning_module.parameters(), *self.lightning_module.buffers()])

    def _bring(self, plan: StagePlan, stage: int) -> None:
        """Bring to the device what `stage` holds."""
        assert self.lightning_module is not None
        if self._holds_a_part:
            bring_part(self.lightning_module, plan, stage, on_device(self.root_device))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state over the whole module, and leave it where each parameter is."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(state)
