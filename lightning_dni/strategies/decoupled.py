"""What every strategy of ours adds to one of Lightning's: the engine around the user's training step."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_dni.core.engine import DNIEngine
from lightning_dni.strategies._compat import MisconfigurationException, TrainerFn, rank_zero_warn
from lightning_dni.strategies.options import DNIOptions, options_from, options_given
from lightning_dni.strategies.table import describe

CHECKPOINT_KEY = "lightning_dni"
PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class DecoupledTraining(Strategy):
    """Mixed into a strategy of Lightning's, before it: trains the module with a `DNIEngine`.

    Args:
        options: The arguments of `DNIOptions` as the user gave them; all defaults leave them to the module.
        base: What the other strategy takes.
    """

    def __init__(self, options: Mapping[str, Any], **base: Any) -> None:
        super().__init__(**base)
        self._options = options_given(options)
        self._engine: DNIEngine | None = None
        self._engine_of: pl.LightningModule | None = None
        self._restored: dict[str, Any] | None = None
        self._resumes = False
        self._attached = False
        self._clears_early = False
        self._closes_window = True

    # ---- what others may see

    @property
    def engine(self) -> DNIEngine:
        """The engine of the fit that runs, or of the last one.

        Raises:
            AttributeError: Before the first fit is set up.
        """
        if self._engine is None:
            raise AttributeError(f"{type(self).__name__} has no engine before `fit` has set it up.")
        return self._engine

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
        return self._options or options_from(module)

    # ---- life of a fit

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as under any strategy; for a fit, build (or restore) the engine and hook the module."""
        super().setup(trainer)
        module = self.lightning_module
        if trainer.state.fn != TrainerFn.FITTING or module is None:
            return
        _refuse_unsupported(trainer, module, self.optimizers)
        if self._engine is None or self._engine_of is not module:
            self._engine, self._engine_of = self._build_engine(module), module
        if self._restored is not None:
            self._engine.load_state_dict(self._restored)
        elif self._resumes:
            rank_zero_warn(
                "The checkpoint holds no gradient estimators (it was written under another strategy): they "
                "start afresh."
            )
        self._restored, self._resumes = None, False
        self._engine.attach()
        self._attached = True
        self._clears_early = not _looks_at_old_gradients(trainer, module)

    def _build_engine(self, module: pl.LightningModule) -> DNIEngine:
        return self._options_for(module).build(module)

    @override
    def teardown(self) -> None:
        """Take the hooks off, also when setup or the fit has failed."""
        if self._engine is not None:
            self._engine.detach()
        self._attached, self._restored, self._resumes = False, None, False
        super().teardown()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Set up the user's optimizer; say of several what is to be done instead."""
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" in str(error):  # Lightning would advise manual optimization
                raise _several_optimizers("several", trainer.lightning_module) from error
            raise

    # ---- one step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Run the user's training step with its forward pass cut at the boundaries."""
        assert self.lightning_module is not None
        batch, trainer = args[0] if args else None, self.lightning_module.trainer
        accumulate = trainer.accumulate_grad_batches
        first = accumulate == 1 or trainer.fit_loop.batch_idx % accumulate == 0
        if first:
            self._begin_window()
        last = self._closes_window
        with self.engine.training_step(batch, accumulate=accumulate, first=first, last=last):
            return super().training_step(*args, **kwargs)

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
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Differentiate the loss through the last stage and merge every gradient that counts."""
        module = self.lightning_module
        assert module is not None
        self.engine.prepare_backward(closure_loss)
        # as Strategy.backward, but merged before on_after_backward, whose hooks see all gradients
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        self.engine.finish_backward()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | torch.nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Let the user's optimizer step, then the estimators."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.engine.update_estimators()
        return output

    # ---- checkpoints: the estimators live in one key of their own

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write the estimators into one key of the checkpoint."""
        if self._engine is not None:
            state = self._engine.state_dict()
            if "optimizer_states" not in checkpoint:  # save_weights_only
                del state["optimizers"]
            checkpoint[CHECKPOINT_KEY] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

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


def _several_optimizers(number: str, module: pl.LightningModule) -> MisconfigurationException:
    return MisconfigurationException(
        f"Expected one optimizer under strategy='dni', but {type(module).__name__}.configure_optimizers gave "
        f"{number}. Merge them into parameter groups of one."
    )


def _refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule, optimizers: list[Optimizer]) -> None:
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"Expected automatic optimization under strategy='dni', but {name}.automatic_optimization is "
            "False. Let Lightning run the optimizer, or use DNIEngine in your own loop."
        )
    if len(optimizers) != 1:
        raise _several_optimizers(str(len(optimizers)), module)
    if isinstance(optimizers[0], LBFGS):
        raise MisconfigurationException(
            "Expected an optimizer that evaluates its closure once under strategy='dni', but got "
            f"{type(optimizers[0]).__name__}, which evaluates it several times. Use SGD or Adam, for example."
        )
    if str(trainer.precision) not in PRECISIONS:
        raise MisconfigurationException(
            f"Expected a precision of {PRECISIONS} under strategy='dni', but got {trainer.precision!r}. Pass "
            "`Trainer(precision=...)` one of them."
        )
