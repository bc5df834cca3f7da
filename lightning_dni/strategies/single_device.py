"""DNIStrategy: train an unedited LightningModule on synthetic gradients, on one device."""

from collections.abc import Mapping
from typing import Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_dni.core.base import UpdateTime
from lightning_dni.core.bootstrap import SequenceEnd
from lightning_dni.core.carry import Truncations
from lightning_dni.core.context import Labels, Where
from lightning_dni.core.health import OnNonfinite
from lightning_dni.core.inputs import InputFactory
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory
from lightning_dni.core.target import Denominator
from lightning_dni.strategies._compat import MisconfigurationException, Precision
from lightning_dni.strategies.decoupled import DecoupledTraining


class DNIStrategy(DecoupledTraining, SingleDeviceStrategy):
    """Cuts the module at `boundaries`; each stage below one learns from its gradient estimator.

    The module, its optimizer and its checkpoints stay what they are under any other strategy. Without
    `boundaries`, the options come from the module's `configure_dni()`, which returns them as a dict.

    Args:
        boundaries: Submodule names or fnmatch patterns, in any order.
        estimator: Called once per boundary with its spec; or {pattern: factory}.
        labels: Where labels are in the batch: "auto", an index, a key, a callable, or None.
        output: Name of the submodule whose output is the network's output; None: the module's own
            `forward`.
        estimator_optimizer: Makes the estimators' optimizer; or {pattern: factory}. None: Adam, 1e-3.
        estimator_steps: Steps of the estimators per step of the user's optimizer.
        estimator_scheduler: Makes a learning-rate scheduler from that optimizer; it steps with it.
        estimator_clip_norm: Norm to which the gradients of each estimator are clipped.
        bp_lambda: 0 (synthetic gradients only) to 1 (backprop); or {pattern: value}.
        update_probability: Probability, above 0 and up to 1, with which the stage below a boundary runs its
            backward pass and updates in a step; or {pattern: value}. The last stage is "(last stage)" there.
            What is drawn holds for a whole accumulated batch.
        update: "step" leaves gradients to the optimizer's step; "immediate" lets the optimizer step a stage
            as soon as its gradient is there, in the forward pass, so that no more than the gradients of one
            stage are alive. The numbers are the same. Hooks around backward and the optimizer's step see
            the gradients that are left: the last stage's, and those of stages that wait.
        loss_denominator: What the training loss is divided by: "batch", "sum", "elements", or a
            callable of batch and h. Where manual optimization accumulates `loss / n`, estimators that do not
            see the network's gradient (LocalLossEstimator) need n times the rows: a callable says so.
        rng: "global" draws the module's random numbers as ever; "stage" gives every stage its own stream.
        synthetic_inputs: Called once per boundary with its spec, whose `input` is the network's: makes what
            predicts, in training, the activation that the stage above goes on from, such as
            MLPInputEstimator; or {pattern: factory, or None for the real activation}. Validation, test and
            prediction always go on from the real one.
        network_input: Where that input is in the batch: "auto", an index, a key, or a callable.
        input_optimizer: Makes the optimizer of what predicts inputs; or {pattern: factory}. None: Adam, 1e-3.
        on_nonfinite: "raise" stops at a loss, a synthetic gradient or a target that is not finite, and names
            it; "skip" leaves it out of that estimator's update, which `dni_skipped/<boundary>` counts.
        truncations: Names or patterns of recurrent submodules above all `boundaries`, called as
            `module(input, state)`: backprop through time ends at the state that comes in, and at the one that
            goes out a synthetic gradient stands for the losses to come; or {pattern: the dimension of the
            state that counts sequences}.
        damping: What synthetic gradients at truncations are multiplied with; or {pattern: value}.
        sequence_end: What rows teach at a truncation that do not go on: "zero", that nothing comes back to
            them (an episode has ended), or "ignore", nothing (a sequence was cut off).
        checkpoint_io: As in any strategy.
        precision_plugin: As in any strategy.

    Raises:
        MisconfigurationException: At setup, where the Trainer asks for what is not supported.
        BoundaryError: At setup, where a boundary names no submodule.
    """

    strategy_name = "dni"

    def __init__(
        self,
        boundaries: list[str] | None = None,
        estimator: EstimatorFactory | Mapping[str, EstimatorFactory] | None = None,
        labels: Labels = "auto",
        output: str | None = None,
        estimator_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        estimator_steps: int = 1,
        estimator_scheduler: ScheduleFactory | None = None,
        estimator_clip_norm: float | None = None,
        bp_lambda: float | Mapping[str, float] = 0.0,
        update_probability: float | Mapping[str, float] = 1.0,
        update: UpdateTime = "step",
        loss_denominator: Denominator = "batch",
        rng: Literal["global", "stage"] = "global",
        on_nonfinite: OnNonfinite = "raise",
        synthetic_inputs: InputFactory | Mapping[str, InputFactory | None] | None = None,
        network_input: Where = "auto",
        input_optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        truncations: Truncations | None = None,
        damping: float | Mapping[str, float] = 1.0,
        sequence_end: SequenceEnd = "zero",
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        given = {
            "boundaries": boundaries,
            "estimator": estimator,
            "labels": labels,
            "output": output,
            "estimator_optimizer": estimator_optimizer,
            "estimator_steps": estimator_steps,
            "estimator_scheduler": estimator_scheduler,
            "estimator_clip_norm": estimator_clip_norm,
            "bp_lambda": bp_lambda,
            "update_probability": update_probability,
            "update": update,
            "loss_denominator": loss_denominator,
            "rng": rng,
            "on_nonfinite": on_nonfinite,
            "synthetic_inputs": synthetic_inputs,
            "network_input": network_input,
            "input_optimizer": input_optimizer,
            "truncations": truncations,
            "damping": damping,
            "sequence_end": sequence_end,
        }
        super().__init__(given, device="cpu", checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._parallel_devices: list[torch.device] | None = None

    # ---- devices: the accelerator connector hands these to whatever strategy has them

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, in the form in which Lightning assigns it; None before."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        """Take the one device that Lightning assigns; refuse several."""
        if devices and len(devices) > 1:
            raise MisconfigurationException(
                f"Expected one device for strategy='dni', but got {len(devices)}. Pass `Trainer(devices=1)`."
            )
        self._parallel_devices = devices
        if devices:
            self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """Always one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        """Refuse several nodes."""
        if num_nodes != 1:
            raise MisconfigurationException(
                f"Expected one node for strategy='dni', but got {num_nodes}. Pass `Trainer(num_nodes=1)`."
            )
