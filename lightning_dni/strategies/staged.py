"""A strategy whose processes are stages: a module in parts, decisions in common, one whole at the end."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dni.core.boundary import choose_by_pattern, resolve_boundaries
from lightning_dni.core.estimator import Signal
from lightning_dni.pipeline.clock import Activity
from lightning_dni.pipeline.connect import close, connect
from lightning_dni.pipeline.engine import StageEngine
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.staged import TRAINING
from lightning_dni.pipeline.watch import Watch, open_watch
from lightning_dni.strategies._compat import AVERAGING, MisconfigurationException, TrainerFn
from lightning_dni.strategies.agreement import agree
from lightning_dni.strategies.bucket import broadcast
from lightning_dni.strategies.decoupled import DecoupledTraining
from lightning_dni.strategies.gathering import (
    gather,
    join_engine_states,
    join_optimizer_states,
    own_optimizer_state,
    share_module,
)
from lightning_dni.strategies.options import DNIOptions
from lightning_dni.strategies.placement import Place, Trial, compare_plans, own_tensors

T = TypeVar("T")


class StagedTraining(DecoupledTraining, DDPStrategy):
    """Trains one stage of the module in each process; the last stage is global rank 0.

    Args:
        options: As in `DecoupledTraining`.
        staleness: As in `DNIPipelineStrategy`.
        base: What DDPStrategy takes.
    """

    def __init__(self, options: Mapping[str, Any], staleness: int, **base: Any) -> None:
        super().__init__(options, **base)
        self._staleness = staleness
        self._place: Place | None = None
        self._links: Links | None = None
        self._watch: Watch | None = None
        self._failed = self._introduced = False

    # ---- which process is which stage

    @property
    @override
    def engine(self) -> StageEngine:
        """The engine of this process's stage."""
        engine = super().engine
        assert isinstance(engine, StageEngine)
        return engine

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every stage reads the same batches."""
        return {"num_replicas": 1, "rank": 0}

    @override
    def _options_for(self, module: pl.LightningModule) -> DNIOptions:
        # every stage draws from streams of its own: the global one stays the same in all processes
        return replace(super()._options_for(module), rng="stage")

    # ---- life of a fit

    @override
    def configure_ddp(self) -> None:
        """Give the module rank 0's parameters and buffers; no wrapper."""
        assert self.lightning_module is not None
        broadcast([*self.lightning_module.parameters(), *self.lightning_module.buffers()])

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as under any strategy, and connect this process with those of the stages beside it."""
        module = self.lightning_module
        assert module is not None
        _refuse_unsupported(trainer, module)
        options = self._options_for(module)
        boundaries = tuple(resolve_boundaries(module, options.boundaries))
        place = self._place = Place.of(self.global_rank, self.world_size, boundaries)
        self._watch = open_watch(f"Stage {place.stage}")
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING and (self._engine is None or self._engine_of is not module):
            self._engine, self._engine_of = self._build_engine(module), module
        self._links = connect(
            place.ranks,
            window=self._staleness + 2,
            device=self.root_device,
            timeout=self._timeout,
            with_output=_hears_output(options, boundaries),
            guard=self._watch,
        )
        self.engine.join(place.stage, self._links, self._staleness)
        self._introduced = False
        agree(trainer, module, place.is_last)

    @override
    def _build_engine(self, module: pl.LightningModule) -> StageEngine:
        seed = self.broadcast(torch.initial_seed())
        return self._options_for(module).build(StageEngine, module, seed=seed)

    def _find_part(self, step: str, args: tuple[Any, ...]) -> None:
        """Find out, from the first batch, what of the model belongs to this stage in `step`."""
        if self.engine.knows(step):
            return
        assert self.lightning_module is not None
        trial = Trial(self.lightning_module, step, args, self.precision_plugin)
        options = self._options_for(self.lightning_module)
        plan = trial.plan(options.boundaries, options.output)
        self._together(partial(compare_plans, plan, args[0] if args else None))
        self.engine.place(plan, step)
        if step == TRAINING:
            self._drop_foreign_state()

    # ---- one step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run this stage's part of the user's training step."""
        self._note("training", args)
        self._find_part(TRAINING, args)
        return super().training_step(*args, **kwargs)

    @override
    def _run_step(self, step: Callable[[], STEP_OUTPUT]) -> STEP_OUTPUT:
        result = self.engine.run(step)
        # only the last stage has a loss; elsewhere Lightning differentiates this
        return result if self.engine.is_last else torch.zeros((), device=self.root_device, requires_grad=True)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Differentiate the loss on the last stage; elsewhere merge what the stage has found out."""
        with self.engine.profile("pipeline.backward"):
            return super().backward(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Let the user's optimizer step; after the first time tell rank 0 what every stage is."""
        output = super().optimizer_step(*args, **kwargs)
        if not self._introduced:
            self._introduced = True
            found = self._together(partial(gather, self.engine.describe()))
            self.engine.introduce([] if found is None else list(reversed(found)))
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

    def _note(self, what: str, args: tuple[Any, ...]) -> None:
        """Have the other stages know where this one is, should it stop."""
        assert self.lightning_module is not None
        if self._watch is not None:
            step = self.lightning_module.trainer.global_step
            self._watch.where = f"{what} batch {args[1] if len(args) > 1 else '?'}, step {step}"

    def _evaluate(self, step: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._note(step.removesuffix("_step"), args)
        self._find_part(step, args)
        return self.engine.evaluate(partial(run, *args, **kwargs), args[0] if args else None, step)

    # ---- what must not cross stages, and what must

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Leave logged values alone: only the last stage has them."""
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What all stages say, or any of them."""
        said = torch.tensor(int(decision), device=self.root_device)
        self._together(partial(dist.all_reduce, said, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX))
        return bool(said)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all stages, unless one has stopped."""
        self._together(partial(super().barrier, *args, **kwargs))

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        """Tell all stages, unless one has stopped."""
        return self._together(partial(super().broadcast, obj, src))

    def _together(self, collective: Callable[[], T]) -> T:
        """What `collective` returns, to which every process has to come; it is left where one has stopped."""
        return collective() if self._watch is None else self._watch.call(collective)

    # ---- the whole module, and what is saved

    def _share_module(self) -> None:
        """Give this process's module what the other stages have learnt."""
        plan = self.engine.plan
        if plan is not None:
            assert self.lightning_module is not None
            ranks = [copies[0] for copies in self._placed().ranks]
            self._together(partial(share_module, self.lightning_module, plan, ranks))

    @override
    def on_train_end(self) -> None:
        """End with the whole trained module in every process."""
        super().on_train_end()
        self._share_module()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole module's state; every process calls it."""
        self._share_module()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state over the whole module on rank 0, this stage's elsewhere; every process calls it."""
        state = super().optimizer_state(optimizer)
        found = self._together(partial(gather, state))
        return state if found is None else join_optimizer_states(found)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state over the whole module, and keep this stage's part."""
        super().load_optimizer_state_dict(checkpoint)
        self._drop_foreign_state()

    def _drop_foreign_state(self) -> None:
        plan = self.engine.plan
        if plan is None:
            return
        assert self.lightning_module is not None
        own = own_tensors(self.lightning_module, plan, self._placed().stage)
        for optimizer in self.optimizers:
            own_optimizer_state(optimizer, own)

    @override
    def _engine_state(self) -> dict[str, Any]:
        self.engine.drain()
        state = self.engine.state_dict()
        found = self._together(partial(gather, state))
        return state if found is None else join_engine_states(found)

    def _placed(self) -> Place:
        assert self._place is not None
        return self._place

    # ---- the end

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other stages why this one stops."""
        self._failed = True
        if self._watch is not None:
            self._watch.report(exception)
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        """Take leave of the other stages."""
        if self._links is not None:
            close(self._links, self._failed)
        if self._watch is not None:
            self._watch.close()
        self._links = self._watch = None
        self._failed = False
        super().teardown()


def _hears_output(options: DNIOptions, boundaries: Iterable[str]) -> bool:
    """Whether an estimator may ask for the network's output; one that a function makes may."""
    for name in boundaries:
        factory: Any = choose_by_pattern(name, options.estimator, "estimator")
        made = factory.func if isinstance(factory, partial) else factory
        if Signal.OUTPUT in getattr(made, "needs", {Signal.OUTPUT}):
            return True
    return False


def _refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected automatic optimization under strategy='dni_pipeline', but {type(module).__name__} has "
            "automatic_optimization=False. Train it under strategy='dni' or 'dni_ddp'."
        )
    if str(trainer.precision) == "16-mixed":
        raise MisconfigurationException(
            "Expected a precision without a gradient scaler under strategy='dni_pipeline', but got "
            "'16-mixed', whose scale would differ between stages. Pass precision='bf16-mixed'."
        )
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector, untyped)
    averaging = [type(c).__name__ for c in callbacks if isinstance(c, AVERAGING)]
    if averaging and trainer.state.fn == TrainerFn.FITTING:
        raise MisconfigurationException(
            f"Expected no weight averaging under strategy='dni_pipeline', but got {averaging}: they would "
            "average stages that this process does not train. Train under strategy='dni' or 'dni_ddp'."
        )
