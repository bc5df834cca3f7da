"""A strategy whose processes are stages: a module in parts, decisions in common, one whole at the end."""

import gc
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dni.core.boundary import resolve_boundaries
from lightning_dni.pipeline.clock import Activity
from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.pipeline.exact import ExactEngine
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.norms import LaggedNorm
from lightning_dni.pipeline.passage import fingerprint
from lightning_dni.pipeline.restoring import norm_of
from lightning_dni.pipeline.riding import carry
from lightning_dni.pipeline.signals import Signals
from lightning_dni.pipeline.staged import TRAINING
from lightning_dni.strategies._compat import TrainerFn, clip_norms_by, worker_seeding
from lightning_dni.strategies.agreement import Agreement, share_for_schedules
from lightning_dni.strategies.alarm import Alarm, first_name, limits_of
from lightning_dni.strategies.automatic import AutomaticBoundaries
from lightning_dni.strategies.clipping import Clip, clip_lagged, clip_share, clip_together, lags_norm
from lightning_dni.strategies.common import StagesInCommon
from lightning_dni.strategies.copies import Copies
from lightning_dni.strategies.exact import ExactSchedule, refuse_own_backward, run_schedule
from lightning_dni.strategies.gathering import gather
from lightning_dni.strategies.options import AUTO, DNIOptions, hears_output, options_from, refuse_truncations
from lightning_dni.strategies.placement import Place, Trial, compare_plans
from lightning_dni.strategies.refusals import (
    refuse_unsupported,
    refuse_waiting,
    warn_of_waits,
)
from lightning_dni.strategies.stopping import CommonStop
from lightning_dni.strategies.updates import refuse_updates_apart

T = TypeVar("T")


class StagedTraining(StagesInCommon):
    """Trains one stage of the module in each process; the last stage is global rank 0.

    Args:
        options: As in `DecoupledTraining`.
        staleness: As in `DNIPipelineStrategy`.
        exact: How to train with exact backprop; None for synthetic gradients.
        silence: As in `DNIPipelineStrategy`.
        stages: As in `DNIPipelineStrategy`.
        save_sharded: As in `DNIPipelineStrategy`.
        clip_norm: As in `DNIPipelineStrategy`.
        base: What DDPStrategy takes.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        staleness: int,
        exact: ExactSchedule | None = None,
        silence: float = 5.0,
        stages: int | None = None,
        save_sharded: bool = False,
        clip_norm: str = "stage",
        **base: Any,
    ) -> None:
        super().__init__(options, exact, save_sharded, **base)
        self._lags_norm = lags_norm(clip_norm, exact is not None)
        self._auto = AutomaticBoundaries(stages)
        self._staleness, self._limits = 0 if exact else staleness, limits_of(silence)
        self._signals = Signals(0, 1, 0)
        self._stop: CommonStop | None = None
        self._agreement: Agreement | None = None
        self._undo: list[Callable[[], None]] = []
        self._introduced = False

    # ---- which process is which stage

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every stage reads the same batches; copies of the pipeline share them."""
        place = self._placed()
        return {"num_replicas": place.copies, "rank": place.copy}

    def _given(self, module: pl.LightningModule) -> DNIOptions:
        options = self._options or options_from(module, exact=self._exact is not None)
        return refuse_truncations(options, "dni_pipeline")

    @override
    def _options_for(self, module: pl.LightningModule) -> DNIOptions:
        # every stage draws from streams of its own: the global one stays the same in all processes
        return replace(self._auto.resolve(module, self._given(module)), rng="stage")

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Have workers draw the same random numbers in every stage; Lightning would have them differ."""
        seeding = worker_seeding(replica=0 if self._place is None else self._place.copy)
        if isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None and seeding is not None:
            dataloader.worker_init_fn = seeding
        return dataloader

    # ---- life of a fit

    @override
    def setup_environment(self) -> None:
        """Find the other processes, and begin to watch them."""
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if self._alarm is not None:
            self._alarm.remove()
        name = first_name(self.global_rank, self.world_size, partial(self._boundaries_of, module))
        self._alarm = Alarm(module.trainer, name, self._limits, self._agreed, self._leave)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as under any strategy, and connect this process with those of the stages beside it."""
        module = self.lightning_module
        assert module is not None
        refuse_unsupported(trainer, module, self._layer_sync)
        if self._exact is not None:
            refuse_own_backward(module)
        given = self._given(module)
        place = self._place = self._auto.place(self.global_rank, self.world_size, module, given)
        if given.boundaries != AUTO:
            refuse_waiting(given, self._boundaries_of(module), self._staleness)
        warn_of_waits(trainer, module)
        assert self._alarm is not None
        watch = self._alarm.watch
        watch.rename(place.names)
        self._copies = Copies(place, self._timeout, self.root_device) if place.copies > 1 else None
        if self._lags_norm:
            self._norm = LaggedNorm(place.stage, len(place.ranks), self._staleness)
            saved = norm_of(self._restored, place.stage, len(place.ranks), self._staleness)
            if saved is not None:
                self._norm.load_state_dict(saved)
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING and (self._engine is None or self._engine_of is not module):
            self._engine, self._engine_of = self._build_engine(module), module
        self._links = self._connect(module)
        copies = self._copies
        unite = None if copies is None else copies.unite
        self._signals = Signals(place.stage, len(place.ranks), self._staleness, watch, unite)
        links = carry(self._signals, self._links)
        if self._norm is not None:
            links = carry(self._norm, links)
        own = place.copy, place.copies
        self.engine.join(place.stage, links, self._staleness, self.root_device, copies, own)
        self._introduced = False
        stop = CommonStop(trainer, self._signals, self._largest, partial(share_for_schedules, trainer))
        self._agreement = Agreement(
            trainer, module, place.is_last, stop.after_evaluation, None if copies is None else copies.group
        )
        self._stop = stop
        stop.install()
        self._undo.append(clip_norms_by(self.precision_plugin, self._clipping(place)))

    def _clipping(self, place: Place) -> Clip:
        """How this stage clips by norm."""
        stages = len(place.ranks)
        if self._exact is not None:
            assert self._alarm is not None
            return clip_together(place.copy == 0, self.root_device, self._alarm.call)
        return clip_share(stages) if self._norm is None else clip_lagged(stages, self._norm)

    def _boundaries_of(self, module: pl.LightningModule) -> tuple[str, ...]:
        return tuple(resolve_boundaries(module, self._options_for(module).boundaries))

    def _connect(self, module: pl.LightningModule) -> Links:
        options, boundaries = self._options_for(module), self._boundaries_of(module)
        return connect(
            self._placed().ranks,
            window=self._exact.window(len(self._placed().ranks)) if self._exact else self._staleness + 2,
            device=self.root_device,
            timeout=self._timeout,
            with_output=self._exact is None and hears_output(options, boundaries),
            guard=None if self._alarm is None else self._alarm.watch,
        )

    def _largest(self, said: torch.Tensor) -> torch.Tensor:
        """The largest of what the processes say, for each element."""
        told = said.to(self.root_device)
        self._together(partial(dist.all_reduce, told, op=dist.ReduceOp.MAX), "agreeing to go on")
        return told

    @override
    def on_train_start(self) -> None:
        """Stop all stages where hooks on one of them say so before the first batch."""
        super().on_train_start()
        assert self._stop is not None
        self._stop.settle()

    @override
    def _build_engine(self, module: pl.LightningModule) -> StageEngine | ExactEngine:
        part = self._exact.first_part if self._exact else tuple
        stages = len(self._placed().ranks)
        self._auto.choose(module.trainer, self._given(module), stages, self._restored, part)
        refuse_updates_apart(self._options_for(module), "dni_pipeline")
        refuse_waiting(self._options_for(module), self._boundaries_of(module), self._staleness)
        seed = self.broadcast(torch.initial_seed())
        exchange = None if self._copies is None else self._copies.reducer
        options, copy = self._options_for(module), self._placed().copy
        if self._exact is not None:
            return self._exact.build(module, options, seed, exchange, copy)
        return options.build(StageEngine, module, seed=seed, exchange=exchange, rank=copy)

    @override
    def _warn_of_loss(self, state: Mapping[str, Any], staleness: int | None = None, copies: int = 1) -> None:
        super()._warn_of_loss(state, self._staleness, self._placed().copies)

    def _find_part(self, step: str, args: tuple[Any, ...]) -> None:
        """Find out, from the first batch, what of the model belongs to this stage in `step`."""
        if self.engine.knows(step):
            return
        assert self.lightning_module is not None
        copies = self._placed().copies
        trial = Trial(self.lightning_module, step, args, self.precision_plugin, copies=copies)
        options = self._options_for(self.lightning_module)
        plan = trial.plan(options.boundaries, options.output, skips=self._exact is not None)
        compare = partial(compare_plans, plan, args[0] if args else None, self.engine.moved, self._placed())
        self._together(compare, f"the first {step}")
        self._bring(plan, self._placed().stage)
        self.engine.place(plan, step)
        if step == TRAINING:
            self._drop_foreign_state()

    # ---- one step

    @property
    def _moves_batches(self) -> bool:
        """Whether batches go to a device from which nobody reads them back to compare them."""
        return self.root_device.type != "cpu"

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch, and remember what it was, for stages to compare."""
        if self._engine is not None:
            self.engine.moved = fingerprint(batch) if self._moves_batches else 0
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run this stage's part of the user's training step."""
        assert self.lightning_module is not None
        self._signals.begin(self.lightning_module.trainer.accumulate_grad_batches)
        self._note("training", args)
        self._find_part(TRAINING, self._exact.first_part(args) if self._exact else args)
        if self._copies is not None and self.lightning_module is not None:
            self._copies.share_buffers(self.lightning_module, self.engine, self._closes_window)
        return super().training_step(*args, **kwargs)

    @override
    def _run_step(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        engine, module = self.engine, self.lightning_module
        assert module is not None
        if isinstance(engine, ExactEngine):
            return run_schedule(engine, module, partial(step, **kwargs), args)
        result = engine.run(partial(step, *args, **kwargs))
        # only the last stage has a loss; elsewhere Lightning differentiates this
        return result if engine.is_last else torch.zeros((), device=self.root_device, requires_grad=True)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Differentiate the loss on the last stage; elsewhere merge what the stage has found out."""
        with self.engine.clock.doing(Activity.BACKWARD):
            return super().backward(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Let the user's optimizer step; after the first time tell rank 0 what every stage is."""
        output = super().optimizer_step(*args, **kwargs)
        if not self._introduced:
            self._introduced = True
            describe = partial(gather, self.engine.describe(), self.root_device)
            found = self._together(describe, "getting to know all stages")
            self.engine.introduce([] if found is None else list(reversed(self._placed().downwards(found))))
            # after start-up Python is due to search all objects, which takes as long as many steps: now, on
            # every stage at once, or soon, on one after another while all others wait
            gc.collect()
        return output

    @override
    def _after_step(self, *args: Any) -> None:
        self.engine.clock.was(Activity.OPTIMIZER)
        super()._after_step(*args)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run this stage's part of the user's validation step."""
        output: STEP_OUTPUT = self._evaluate("validation_step", super().validation_step, args, kwargs)
        return output

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run this stage's part of the user's test step."""
        output: STEP_OUTPUT = self._evaluate("test_step", super().test_step, args, kwargs)
        return output

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run this stage's part of the user's predict step."""
        return self._evaluate("predict_step", super().predict_step, args, kwargs)

    def _evaluate(self, step: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._note(step.removesuffix("_step"), args)
        self._find_part(step, args)
        self._signals.begin()
        result = self.engine.evaluate(partial(run, *args, **kwargs), args[0] if args else None, step)
        if self._stop is not None:
            self._stop.after_evaluation_batch()
        return result

    # ---- the end

    def _agreed(self, exception: BaseException) -> bool:
        return self._stop is not None and self._stop.ends_by(exception)

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other stages why this one stops, unless all have agreed to."""
        if self._alarm is not None:
            self._alarm.ring(exception)
        elif self.launcher is not None:  # whom this process has started waits for it to begin
            self.launcher.kill(signal.SIGTERM)
        super().on_exception(exception)

    def _leave(self) -> None:
        """Close the ways to the stages beside this one."""
        if self._links is not None:
            close(self._links, failed=self._alarm is not None and self._alarm.failed)
        self._links = None

    @override
    def teardown(self) -> None:
        """Take leave of the other stages."""
        if self._stop is not None:
            self._stop.remove()
        if self._agreement is not None:
            self._agreement.remove()
        self._stop = self._agreement = None
        while self._undo:
            self._undo.pop()()
        if self._alarm is not None:
            self._alarm.remove()
        self._alarm = None
        super().teardown()
