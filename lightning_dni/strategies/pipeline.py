"""DNIPipelineStrategy: every stage in a process of its own, none of which waits for a backward pass."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

from lightning.fabric.plugins import CheckpointIO

from lightning_dni.core.base import UpdateTime
from lightning_dni.core.context import Labels
from lightning_dni.core.health import OnNonfinite
from lightning_dni.core.optimizer import OptimizerFactory, ScheduleFactory
from lightning_dni.core.pool import EstimatorFactory
from lightning_dni.core.target import Denominator
from lightning_dni.pipeline.exact import no_estimator
from lightning_dni.strategies._compat import MisconfigurationException, Precision
from lightning_dni.strategies.exact import DEFAULT_STALENESS, ExactSchedule
from lightning_dni.strategies.staged import StagedTraining


class DNIPipelineStrategy(StagedTraining):
    """Trains every stage in a process of its own; the last stage is global rank 0.

    A stage sends its output on, takes its synthetic gradient, updates, and starts on the next batch at once.
    Target gradients come back later and train the estimators: always `staleness` updates later, so a run is
    the same to the bit however fast the processes are. An exact schedule trains the same stages with
    backprop.

    Values that are logged and decisions are those of the last stage, on every rank. `trainer.should_stop`,
    set on any rank, `max_time` and a SIGTERM end the fit on all ranks after the same batch, at most
    `staleness + 2` batches per stage later; no stage waits for another one to find out. `gradient_clip_val`
    clips by norm as `clip_norm` says, under an exact schedule by the norm over all stages, and by value as
    in one process.

    Args:
        boundaries: As in `DNIStrategy`; their number plus one is that of the processes. "auto" chooses them
            on the first training batch, so that no stage takes longer in a forward pass than it must, and
            says which; estimators and backward passes are not measured. Data that can be read once, and a
            training step that needs what is made after `setup`, need names.
        estimator: As in `DNIStrategy`.
        labels: As in `DNIStrategy`.
        output: As in `DNIStrategy`.
        estimator_optimizer: As in `DNIStrategy`.
        estimator_steps: As in `DNIStrategy`.
        estimator_scheduler: As in `DNIStrategy`.
        estimator_clip_norm: As in `DNIStrategy`.
        bp_lambda: As in `DNIStrategy`; above 0 a stage waits for the one above, and `staleness` must be 0.
        update_probability: 1, since every stage updates in every batch.
        update: "step", since every stage updates by itself as soon as its gradient is there.
        loss_denominator: As in `DNIStrategy`.
        on_nonfinite: As in `DNIStrategy`.
        staleness: Number of updates after which an estimator learns from a target gradient; 0 waits for
            the target gradient of the same batch.
        schedule: "dni" trains on synthetic gradients; "1f1b" and "gpipe" with exact backprop, equal to a
            Trainer with `accumulate_grad_batches=microbatches` and batches of that fraction of the rows.
            They take `boundaries` and `output`, and nothing else about gradients.
        microbatches: Parts into which an exact schedule splits every batch, by rows. The user's step runs
            on each, also where it logs: a row has the last one's value, an epoch's mean counts rows. What it
            returns beside the loss comes in lists. Hooks around backward run once per batch.
        silence: Seconds without a sign of life after which a stage that is stopped counts as frozen, and is
            ended, or one on another machine that does not answer as dead or out of reach; a slow one is
            left alone. Where other machines cannot be called at all (a firewall), 12 times as many.
        stages: Number of stages with boundaries="auto"; None: that of the processes. A divisor of it makes
            copies of the pipeline.
        save_sharded: Whether a checkpoint is a folder into which every stage writes its own tensors, in a
            file system that all of them see; nobody gathers them, and after a fit rank 0 alone has the
            whole module. Our strategies resume from it; `strategies.consolidate` makes it an ordinary one.
        clip_norm: How `gradient_clip_val` clips the norm. "stage": every stage by itself to
            `gradient_clip_val / sqrt(stages)`, so that the norm over all stages is within it. "lagged": by
            the norm over all stages `1 + (stages - 1) * (staleness + 1)` updates ago, and until then as
            "stage"; it travels along with the messages, and no stage waits for it.
        checkpoint_io: As in any strategy.
        precision_plugin: As in any strategy.
        process_group_backend: As in DDPStrategy: "gloo" or "nccl"; None: what the accelerator uses.
        timeout: As in DDPStrategy.
        start_method: As in DDPStrategy: "popen", "spawn", "fork" or "forkserver".

    Raises:
        MisconfigurationException: At setup, where the Trainer asks for what is not supported.
        BoundaryError: At setup or on the first batch, where the module cannot be cut there.
        StageError: In training, where another stage has stopped, or the stages read different data.
    """

    strategy_name = "dni_pipeline"

    def __init__(
        self,
        boundaries: list[str] | Literal["auto"] | None = None,
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
        on_nonfinite: OnNonfinite = "raise",
        staleness: int = DEFAULT_STALENESS,
        schedule: Literal["dni", "1f1b", "gpipe"] = "dni",
        microbatches: int = 1,
        silence: float = 5.0,
        stages: int | None = None,
        save_sharded: bool = False,
        clip_norm: Literal["stage", "lagged"] = "stage",
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
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
            "rng": "global",
            "on_nonfinite": on_nonfinite,
        }
        exact = ExactSchedule.of(schedule, microbatches, staleness, given)
        if exact is not None and boundaries is not None:
            given["estimator"] = no_estimator
        if save_sharded and checkpoint_io is not None:
            raise MisconfigurationException(
                "Expected no `checkpoint_io` with save_sharded=True, but got "
                f"{type(checkpoint_io).__name__}: the shards are written by torch.distributed.checkpoint. "
                "Leave one of the two out."
            )
        super().__init__(
            given,
            staleness,
            exact,
            silence,
            stages,
            save_sharded,
            clip_norm,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
