"""DNIDDPStrategy: the same training in several processes, each on its own part of every batch."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_dni.core.base import Engine, UpdateTime
from lightning_dni.core.bootstrap import SequenceEnd
from lightning_dni.core.carry import Truncations
from lightning_dni.core.context import Labels, Where
from lightning_dni.core.engine import DNIEngine
from lightning_dni.core.health import OnNonfinite
from lightning_dni.core.inputs import InputFactory
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory
from lightning_dni.core.target import Denominator
from lightning_dni.strategies._compat import MisconfigurationException, Precision
from lightning_dni.strategies.bucket import broadcast
from lightning_dni.strategies.decoupled import DecoupledTraining
from lightning_dni.strategies.reducer import GradientReducer
from lightning_dni.strategies.updates import refuse_replicas


class DNIDDPStrategy(DecoupledTraining, DDPStrategy):
    """Like `DNIStrategy`, data-parallel: every process trains a replica, and gradients are averaged.

    The gradients of a stage are averaged over the processes while the next stage's forward pass runs, in
    buckets and without torch's DDP wrapper; those of the estimators too, so the replicas stay equal.
    Synthetic gradients, their targets and `loss_denominator` are those of a process's own rows: with equal
    numbers of rows N processes do what one does on the joint batch, otherwise each process counts the same,
    as under Lightning's own DDPStrategy. Parameters without a gradient need no option. Buffers are rank
    0's, taken over at the start of every optimizer step and of every validation. `engine.last_report` tells
    of a process's own rows.

    Args:
        boundaries: As in `DNIStrategy`.
        estimator: As in `DNIStrategy`.
        labels: As in `DNIStrategy`.
        output: As in `DNIStrategy`.
        estimator_optimizer: As in `DNIStrategy`.
        estimator_steps: As in `DNIStrategy`.
        estimator_scheduler: As in `DNIStrategy`.
        estimator_clip_norm: As in `DNIStrategy`; every process clips the averaged gradients.
        bp_lambda: As in `DNIStrategy`; at 1 two processes equal two of Lightning's own DDPStrategy.
        update_probability: As in `DNIStrategy`; all processes draw the same.
        update: As in `DNIStrategy`; with several processes "step" only.
        loss_denominator: As in `DNIStrategy`.
        rng: As in `DNIStrategy`; streams of "stage" differ between processes.
        synthetic_inputs: As in `DNIStrategy`; with one process only.
        network_input: As in `DNIStrategy`.
        input_optimizer: As in `DNIStrategy`.
        on_nonfinite: As in `DNIStrategy`; all processes stop together, when Lightning next logs.
        truncations: As in `DNIStrategy`; every process goes on from states of its own.
        damping: As in `DNIStrategy`.
        sequence_end: As in `DNIStrategy`.
        checkpoint_io: As in any strategy.
        precision_plugin: As in any strategy.
        process_group_backend: As in DDPStrategy: "gloo" or "nccl"; None: what the accelerator uses.
        timeout: As in DDPStrategy.
        start_method: As in DDPStrategy: "popen", "spawn", "fork" or "forkserver".
        bucket_cap_mb: Megabytes that are averaged at once, at most (a single parameter may be larger).

    Raises:
        MisconfigurationException: At setup, where the Trainer asks for what is not supported.
        BoundaryError: At setup, where a boundary names no submodule.
        StageError: In training, where the processes do not have the same parameters.
    """

    strategy_name = "dni_ddp"

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
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        bucket_cap_mb: float = 25.0,
    ) -> None:
        if not bucket_cap_mb > 0:
            raise MisconfigurationException(
                f"Expected `bucket_cap_mb` to be positive, but got {bucket_cap_mb!r}. Leave it out for 25."
            )
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
        super().__init__(
            given,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._bucket_cap_mb = bucket_cap_mb
        self._reducer: GradientReducer | None = None
        self._buffers_differ = self._truncates = False

    # ---- replicas start equal

    @override
    def configure_ddp(self) -> None:
        """Give the module rank 0's parameters and buffers; no wrapper, since it would see no gradient."""
        if self.world_size > 1:
            assert self.lightning_module is not None
            broadcast([*self.lightning_module.parameters(), *self.lightning_module.buffers()])

    @override
    def _build_engine(self, module: pl.LightningModule) -> Engine:
        if self.world_size == 1:
            return super()._build_engine(module)
        options = self._options_for(module)
        refuse_replicas(options, self.world_size)
        self._truncates = bool(options.truncations)
        self._reducer = GradientReducer(self._bucket_cap_mb, self._timeout)
        seed = self.broadcast(torch.initial_seed())
        return options.build(DNIEngine, module, seed=seed, exchange=self._reducer, rank=self.global_rank)

    # ---- one step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's training step as under `DNIStrategy`, with rank 0's buffers."""
        self._share_buffers()
        self._buffers_differ = self._closes_window
        return super().training_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        """Validate with rank 0's buffers everywhere."""
        super().on_validation_start()
        self._share_buffers()

    def _share_buffers(self) -> None:
        if not self._buffers_differ or self.world_size == 1:
            return
        self._buffers_differ = False
        assert self.lightning_module is not None
        estimators = self.engine.estimators
        buffers: list[Tensor] = list(self.lightning_module.buffers())
        for name in sorted(estimators):
            buffers += estimators[name].buffers()
        broadcast(buffers)

    # ---- checkpoints: what sequences go on from is each process's own

    @override
    def _engine_state(self) -> dict[str, Any] | None:
        """Rank 0's, with what the sequences of every process go on from."""
        state = super()._engine_state()
        if state is not None and self._truncates and self._reducer is not None:
            own = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, state.pop("truncations", {}))
            state["replicas"] = self._reducer.gather(own)
        return state

    @override
    def _replica(self) -> tuple[int, int]:
        return self.world_size, self.global_rank
