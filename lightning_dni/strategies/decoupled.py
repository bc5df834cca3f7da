"""What every strategy of ours adds to one of Lightning's: the engine around the user's training step."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_dni.core.base import Engine
from lightning_dni.core.engine import DNIEngine
from lightning_dni.core.estimator import GradientEstimator
from lightning_dni.core.profile import no_profile
from lightning_dni.pipeline.restoring import left_out, pick_sequences
from lightning_dni.strategies._compat import MisconfigurationException, TrainerFn, rank_zero_warn
from lightning_dni.strategies.options import DNIOptions, options_from, options_given, refuse_auto
from lightning_dni.strategies.sharding import CHECKPOINT_KEY, consolidate, is_sharded
from lightning_dni.strategies.table import describe
from lightning_dni.strategies.updates import TrainerUpdates, clip_values_if_any, refuse_updates

PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")


class DecoupledTraining(Strategy):
    """Mixed into a strategy of Lightning's, before it: trains the module with a `DNIEngine`.

    Args:
        options: The arguments of `DNIOptions` as the user gave them; all defaults leave them to the module.
        base: What the other strategy takes.
    """

    def __init__(self, options: Mapping[str, Any], **base: Any) -> None:
        super().__init__(**base)
        _warn_of_another_lightning()
        self._options = options_given(options)
        self._engine: Engine | None = None
        self._engine_of: pl.LightningModule | None = None
        self._restored: dict[str, Any] | None = None
        self._resumes = False
        self._attached = False
        self._clears_early = False
        self._watched: dict[Optimizer, RemovableHandle] = {}
        self._closes_window = True
        self._updating = False
        self._unclip: Callable[[], None] | None = None

    # ---- what others may see

    def __repr__(self) -> str:
        """What it is, and of which Lightning: the other one's Trainer shows this when it refuses it."""
        return f"<{type(self).__name__}, a strategy for Trainers of `import lightning.pytorch as pl`>"

    @property
    def engine(self) -> Engine:
        """The engine of the fit that runs, or of the last one.

        Raises:
            AttributeError: Before the first fit is set up.
        """
        if self._engine is None:
            raise AttributeError(f"{type(self).__name__} has no engine before `fit` has set it up.")
        return self._engine

    @property
    def estimators(self) -> dict[str, GradientEstimator]:
        """The estimators built so far, by boundary; in a pipeline those of this process's stage.

        Raises:
            AttributeError: Before the first fit is set up.
        """
        return self.engine.estimators

    def describe(self, module: pl.LightningModule | None = None) -> None:
        """Print the stages of `module` (or of the module being trained) without training it."""
        target = self.lightning_module if module is None else module
        if target is None:
            raise MisconfigurationException(
                f"Expected a module to describe, but {type(self).__name__} is not connected to any yet. Call "
                "`strategy.describe(module)`."
            )
        describe(target, self._options_for(target))

    def _options_for(self, module: pl.LightningModule) -> DNIOptions:
        options = self._options or options_from(module)
        return refuse_auto(options, str(getattr(self, "strategy_name", type(self).__name__)))

    # ---- life of a fit

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as under any strategy; for a fit, build (or restore) the engine and hook the module."""
        super().setup(trainer)
        module = self.lightning_module
        if trainer.state.fn != TrainerFn.FITTING or module is None:
            return
        _refuse_unsupported(trainer, self.optimizers)
        if self._engine is None or self._engine_of is not module:
            self._engine, self._engine_of = self._build_engine(module), module
        refuse_updates(trainer, module, self.optimizers, self._engine)
        if self._restored is not None:
            self._engine.load_state_dict(self._restored)
            self._warn_of_loss(self._restored)
        elif self._resumes:
            rank_zero_warn(
                "The checkpoint holds no gradient estimators (it was written under another strategy): they "
                "start afresh."
            )
        self._restored, self._resumes = None, False
        profiler: Profiler = getattr(trainer, "profiler")  # noqa: B009  (set by a connector, untyped)
        if not isinstance(profiler, PassThroughProfiler):
            self._engine.time_with(profiler.profile)
        self._engine.attach()
        self._attached, self._unclip = True, clip_values_if_any(self.precision_plugin)
        keeps_old = not self._engine.updates_immediately and _looks_at_old_gradients(trainer, module)
        self._clears_early = module.automatic_optimization and not keeps_old
        self._watch_optimizers()

    def _warn_of_loss(self, state: Mapping[str, Any], staleness: int | None = None, copies: int = 1) -> None:
        """Say what a fit from `state` does not go on with."""
        clauses = left_out(state, self.engine.boundaries, staleness, self.engine.predicts_inputs, copies)
        if clauses:
            rank_zero_warn(f"Not all that the checkpoint holds is gone on with: {'; '.join(clauses)}.")

    def _build_engine(self, module: pl.LightningModule) -> Engine:
        return self._options_for(module).build(DNIEngine, module)

    @override
    def teardown(self) -> None:
        """Take the hooks off, also when setup or the fit has failed."""
        if self._engine is not None:
            self._engine.detach()
            self._engine.time_with(no_profile)
        self._leave_optimizers()
        if self._unclip is not None:
            self._unclip()
            self._unclip = None
        self._attached, self._restored, self._resumes = False, None, False
        super().teardown()

    # ---- one step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's training step with its forward pass cut at the boundaries."""
        module = self.lightning_module
        assert module is not None
        batch, trainer = args[0] if args else None, module.trainer
        automatic, accumulate = module.automatic_optimization, trainer.accumulate_grad_batches
        first = accumulate == 1 or trainer.fit_loop.batch_idx % accumulate == 0
        if automatic and first:
            self._begin_window()
        with self.engine.training_step(
            batch,
            accumulate=accumulate,
            scale=self._loss_scale(),
            several_losses=not automatic,
            first=first,
            last=self._closes_window and (self._updating or not self.engine.updates_immediately),
        ):
            return self._run_step(super().training_step, *args, **kwargs)

    def _run_step(self, step: Callable[..., STEP_OUTPUT], *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's training step inside the engine's."""
        return step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients to this process: more batches of the same optimizer step follow."""
        self._closes_window = False
        try:
            yield
        finally:
            self._closes_window = True

    def _loss_scale(self) -> Callable[[], Tensor] | None:
        """Gives what the precision plugin will multiply the loss with, without waiting for the device."""
        plugin = self.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
            return None
        return partial(plugin.scaler.scale, torch.ones((), device=self.root_device))

    def _begin_window(self) -> None:
        """Forget gradients of the last window: ours, which a failed one may have left, and the user's.

        Lightning clears the user's only after the forward pass, by when new ones are set aside.
        """
        self.engine.drop_estimator_gradients()
        if self._clears_early:
            for group in self.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate the loss through the last stage and merge every gradient that counts."""
        module = self.lightning_module
        assert module is not None
        closure_loss = self.engine.prepare_backward(closure_loss)
        # as Strategy.backward, but merged before on_after_backward, whose hooks see all gradients
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        if self.engine.differentiates_loss:
            self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        self.engine.finish_backward()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(
        self,
        optimizer: Any,  # an Optimizer, or a wrapper that Lightning takes for one
        closure: Callable[[], Any],
        model: "pl.LightningModule | torch.nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Let the user's optimizer step; the estimators follow when it has."""
        with self._in_parts(optimizer):
            output = super().optimizer_step(optimizer, _Once(closure, optimizer), model, **kwargs)
        if optimizer not in self._watched:
            self.engine.update_estimators()
        self.engine.drop_estimator_gradients()  # left where a gradient scaler has found an overflow
        if self._looks():
            self.engine.check_values()
        return output

    @contextmanager
    def _in_parts(self, optimizer: Any) -> Iterator[None]:
        """Let stages step immediately with `optimizer`, where they are to."""
        if not self.engine.updates_immediately:
            yield
            return
        assert self.lightning_module is not None
        clip_value = self.lightning_module.trainer.gradient_clip_val
        self.engine.updater, self._updating = TrainerUpdates(optimizer, clip_value), True
        try:
            yield
        finally:
            self.engine.updater, self._updating = None, False

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Set up the user's optimizers, in mid-fit, too."""
        super().setup_optimizers(trainer)
        if self._attached:
            self._watch_optimizers()

    def _watch_optimizers(self) -> None:
        """Have the estimators step after every step of the user's optimizers, whoever makes them step."""
        self._leave_optimizers()
        for optimizer in dict.fromkeys(self.optimizers):
            with suppress(AttributeError):  # a wrapper without torch's hooks: its steps are Lightning's
                self._watched[optimizer] = optimizer.register_step_post_hook(self._after_step)

    def _leave_optimizers(self) -> None:
        while self._watched:
            self._watched.popitem()[1].remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers are called, and do nothing then
        if overflow is None or not bool(overflow):
            self.engine.update_estimators()

    def _looks(self) -> bool:
        """Whether Lightning looks at values in this step, too, to log them."""
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        return bool(trainer.global_step % max(1, trainer.log_every_n_steps) == 0)

    @override
    def on_train_end(self) -> None:
        """Look at what nobody has looked at yet."""
        super().on_train_end()
        self.engine.check_values()

    # ---- checkpoints: the estimators live in one key of their own

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write the estimators into one key of the checkpoint."""
        if self._engine is not None and self._engine_of is self.lightning_module:
            state = self._engine_state()
            if state is not None:
                if "optimizer_states" not in checkpoint:  # save_weights_only
                    del state["optimizers"], state["schedules"]
                    for under_way in ("delayed", "truncations", "replicas"):
                        state.pop(under_way, None)
                    state.get("inputs", {}).pop("optimizers", None)
                checkpoint[CHECKPOINT_KEY] = state
        self._write(checkpoint, filepath, storage_options)

    def _write(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, also one that a pipeline has written in shards."""
        if is_sharded(checkpoint_path):
            return consolidate(checkpoint_path, *args, **kwargs)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        pick_sequences(checkpoint.get(CHECKPOINT_KEY, {}), *self._replica())
        return checkpoint

    def _replica(self) -> tuple[int, int]:
        """Number of processes that train on sequences of their own, and which of them this is."""
        return 1, 0

    def _engine_state(self) -> dict[str, Any] | None:
        """What the checkpoint keeps of the engine; None for nothing."""
        return self.engine.state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module; keep the estimators' state until the engine is there."""
        super().load_model_state_dict(checkpoint, strict)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is not None:  # lambda is what the constructor asks for, unless a scheduler moves it
            state = {key: value for key, value in state.items() if key != "bp_lambda"}
        if self._attached and state is not None:  # the learning rate finder restores in mid-fit
            self.engine.load_state_dict(state)
        elif not self._attached:
            self._restored, self._resumes = state, True


def _warn_of_another_lightning() -> None:
    other = sys.modules.get("pytorch_lightning")
    kinds = [] if other is None else other.LightningModule.__subclasses__()
    names = [kind.__name__ for kind in kinds if not kind.__module__.startswith("pytorch_lightning")]
    if names:
        rank_zero_warn(
            f"Expected modules of lightning.pytorch, but {names} are of pytorch_lightning, whose classes are "
            "others: a Trainer with this strategy refuses them. Replace `import pytorch_lightning as pl` by "
            "`import lightning.pytorch as pl`, everywhere."
        )


def _looks_at_old_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether somebody may want the last window's gradients between its end and `zero_grad`."""
    kind = type(module)
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009  (set by a connector, untyped)
    return (
        kind.optimizer_zero_grad is not pl.LightningModule.optimizer_zero_grad
        or kind.on_before_zero_grad is not pl.LightningModule.on_before_zero_grad
        or any(type(c).on_before_zero_grad is not pl.Callback.on_before_zero_grad for c in callbacks)
        # its last epoch runs without zero_grad and backward, and steps with what is there
        or any(isinstance(c, StochasticWeightAveraging) for c in callbacks)
    )


class _Once:
    """A closure that may be evaluated once: at a second time the synthetic gradients would be others.

    Args:
        closure: The user's, or Lightning's.
        optimizer: What evaluates it, named in the error.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: Any) -> None:
        self._closure, self._optimizer, self._done = closure, optimizer, False

    def __call__(self) -> Any:
        if self._done:
            raise _evaluates_again(self._optimizer)
        self._done = True
        return self._closure()


def _evaluates_again(optimizer: Any) -> MisconfigurationException:
    return MisconfigurationException(
        "Expected an optimizer that evaluates its closure once under synthetic gradients, but got "
        f"{type(optimizer).__name__}, which evaluates it several times. Use SGD or Adam, for example."
    )


def _refuse_unsupported(trainer: pl.Trainer, optimizers: Iterable[Any]) -> None:
    repeating = next((o for o in optimizers if isinstance(o, LBFGS)), None)
    if repeating is not None:
        raise _evaluates_again(repeating)
    if str(trainer.precision) not in PRECISIONS:
        raise MisconfigurationException(
            f"Expected a precision of {PRECISIONS} under synthetic gradients, but got {trainer.precision!r}. "
            "Pass `Trainer(precision=...)` one of them."
        )
