"""Immediate updates: a stage's parameters step as soon as its gradient is there, in the forward pass.

The order is that of the paper (Jaderberg et al. 2017): run a stage, ask the estimator, update the stage, go
on to the next one. Nobody holds more gradients than those of one stage. As every stage has parameters of its
own, all gradients are those that one update at the end would have been given.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizers

from lightning_dni.core.boundary import modules_by_stage
from lightning_dni.core.cut import Cut
from lightning_dni.core.hooks import hooks_asleep
from lightning_dni.core.stage import accumulate, without_autocast
from lightning_dni.errors import EstimatorError, StageError


@runtime_checkable
class Updater(Protocol):
    """Updates some parameters at a time: the user's optimizer, as the engine sees it."""

    def owns(self, variable: Tensor) -> bool:
        """Whether it is there to update `variable`."""

    def update(self, parameters: Sequence[Tensor]) -> None:
        """Update these parameters, and no others, with what their `.grad` holds."""


class SplitOptimizer:
    """The user's own optimizer, a stage at a time: its state, groups and rates stay the only ones.

    Hooks on its steps run in its own step alone, which takes what is left at the end.

    Args:
        optimizer: Any optimizer of torch's kind that keeps its state by parameter.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> SplitOptimizer(optimizer).update(list(model[0].parameters()))
    >>> len(optimizer.state), len(optimizer.param_groups[0]["params"])
    (2, 4)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._group_of: dict[Tensor, int] = {}
        for place, group in enumerate(optimizer.param_groups):
            self._group_of |= dict.fromkeys(group["params"], place)

    def owns(self, variable: Tensor) -> bool:
        """Whether the optimizer has `variable`."""
        return variable in self._group_of

    def update(self, parameters: Sequence[Tensor]) -> None:
        """Let the optimizer step as if it had these parameters only.

        Raises:
            StageError: It keeps a state for all of them together.
        """
        groups = list(self._optimizer.param_groups)
        parts: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            parts.setdefault(self._group_of[parameter], []).append(parameter)
        whole = {place: groups[place]["params"] for place in parts}
        before = _shared(self._optimizer, parts)
        try:
            for place, part in parts.items():
                groups[place]["params"] = part
            # in place: a wrapper has the list of the optimizer that it wraps
            self._optimizer.param_groups[:] = [groups[place] for place in sorted(parts)]
            with hooks_asleep(_step_hooks(self._optimizer)):
                self._optimizer.step()
        finally:
            self._optimizer.param_groups[:] = groups
            for place, params in whole.items():
                groups[place]["params"] = params
        _refuse_changed(self._optimizer, before, _shared(self._optimizer, parts))


_Shared = dict[tuple[int | None, str], tuple[Any, int]]
"""Values by place of a group (None: the optimizer's own) and name, and how often each changed in place."""


def _shared(optimizer: Optimizer, places: Iterable[int]) -> _Shared:
    """What the optimizer keeps for several parameters together, beside their lists."""
    wrapped = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
    own = {k: v for each in (optimizer, *wrapped) for k, v in vars(each).items() if _is_number(v)}
    own.pop("_step_count", None)  # where schedulers of older versions of torch count its steps
    kept: dict[tuple[int | None, str], Any] = {(None, name): value for name, value in own.items()}
    kept |= {
        (place, name): value
        for place in places
        for name, value in optimizer.param_groups[place].items()
        if name != "params"
    }
    return {key: (v, v._version if torch.is_tensor(v) else 0) for key, v in kept.items()}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or torch.is_tensor(value)


def _refuse_changed(optimizer: Optimizer, before: _Shared, after: _Shared) -> None:
    changed = [key[1] for key, now in after.items() if key not in before or not _is_same(*before[key], *now)]
    changed += [str(key) for key in optimizer.state if not torch.is_tensor(key)]
    if changed:
        raise StageError(
            "Expected an optimizer that keeps its state by parameter with update='immediate', but the step "
            f"of {type(optimizer).__name__} changes {changed} of a whole group or of its own, and would do "
            "so once per stage. Use SGD or Adam, for example, or pass update='step'."
        )


def _is_same(before: Any, changes: int, now: Any, changes_now: int) -> bool:
    return changes == changes_now and (now is before or (not torch.is_tensor(now) and now == before))


def _step_hooks(optimizer: Optimizer) -> list[dict[int, Any]]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    own = [getattr(optimizer, name) for name in names if hasattr(optimizer, name)]  # some wrappers have none
    return [*own, _optimizers._global_optimizer_pre_hooks, _optimizers._global_optimizer_post_hooks]


class ImmediateUpdates:
    """The updates of one step.

    Args:
        updater: Takes them.
        names: The model's parameters by name.
        bp_lambda: Lambda of BP(lambda) by boundary.
        adds: Whether `.grad` holds what earlier parts of the step have left.
        judges: Whether what is not finite is left for the end of the step, where it is judged.
    """

    def __init__(
        self,
        updater: Updater,
        names: Mapping[str, nn.Parameter],
        bp_lambda: Mapping[str, float],
        adds: bool,
        judges: bool,
    ) -> None:
        self._updater, self._names = updater, names
        self._waiting = {name for name, weight in bp_lambda.items() if weight > 0}
        self._adds, self._judges = adds, judges
        self._updated: set[Tensor] = set()

    def refuse_updated(self, variables: Sequence[Tensor], consumer: str) -> None:
        """Refuse a graph that comes to parameters which were updated in this forward pass.

        Args:
            variables: The leaf tensors to which it comes.
            consumer: Whose graph it is, for the message.

        Raises:
            StageError: There are some.
        """
        again = [v for v in variables if v in self._updated]
        if again:
            named = [name for name, p in self._names.items() if any(p is v for v in again)]
            raise StageError(
                f"Expected every parameter in one stage with update='immediate', but {consumer} comes to "
                f"{named}, updated already in this forward pass (weights that two stages use, a module that "
                "runs twice, a penalty on weights, or a second forward pass). Pass update='step'; put what "
                "is only looked at under torch.no_grad()."
            )

    def has_updated(self, variables: Iterable[Tensor]) -> bool:
        """Whether any of these has stepped in this forward pass."""
        return any(variable in self._updated for variable in variables)

    def take(self, cut: Cut, fired: Mapping[str, int]) -> None:
        """Update the stage below `cut` now, unless something defers it to the end of the step.

        Args:
            cut: The crossing above the stage, which was just differentiated.
            fired: The boundaries that ran so far.
        """
        if cut.waits or any(name not in fired for name in self._waiting):
            return
        if self._judges and cut.said is not None and not math.isfinite(cut.said.item()):
            return
        owned = [(v, g) for v, g in cut.param_grads if self._updater.owns(v)]
        if not owned:
            return
        cut.param_grads = [(v, g) for v, g in cut.param_grads if not self._updater.owns(v)]
        if self._adds:
            accumulate(owned)
        else:  # whatever `.grad` holds is of an earlier step
            for variable, gradient in owned:
                variable.grad = gradient
        parameters = [variable for variable, _ in owned]
        with _full_precision(parameters[0].device.type):
            self._updater.update(parameters)
        for parameter in parameters:
            parameter.grad = None
        self._updated.update(parameters)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Run a step of an optimizer apart from the autocast of the forward pass around it."""
    with without_autocast(device):
        yield
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()  # it holds what the parameters were before


def check_update(update: str, *, has_replicas: bool) -> None:
    """Refuse a time of update that there is not, or that does not go with replicas.

    Raises:
        EstimatorError: There is none of that name.
        StageError: Replicas would have to wait for each other.
    """
    if update not in ("step", "immediate"):
        raise EstimatorError(f"Expected `update` to be 'step' or 'immediate', but got {update!r}.")
    if update == "immediate" and has_replicas:
        raise StageError(
            "Expected no replicas with update='immediate', but got an `exchange`: every stage would wait "
            "for the others' gradients in the forward pass. Pass update='step'."
        )


def expect_updater(updater: Updater | None, several_losses: bool, steps: bool) -> Updater | None:
    """What takes immediate updates; None where no stage `steps`, since more batches of the update follow.

    Raises:
        StageError: Nothing does, or the step has several losses.
    """
    if several_losses:
        raise StageError(
            "Expected one loss per training step with update='immediate', but got several_losses=True: "
            "stages below one loss would step before another's forward pass. Pass update='step'."
        )
    if not steps:
        return None
    if updater is None:
        raise StageError(
            "Expected `engine.updater` to be set with update='immediate', but got none. Write "
            "`engine.updater = SplitOptimizer(optimizer)` before the training loop."
        )
    return updater


def refuse_tied(model: nn.Module, boundaries: Mapping[str, nn.Module]) -> None:
    """Refuse parameters that modules of different stages have in common.

    Args:
        model: The model.
        boundaries: The boundaries' modules by name.

    Raises:
        StageError: There are some.
    """
    names = {module: name for name, module in model.named_modules()}
    owner: dict[Tensor, tuple[str, str]] = {}
    pairs = [(m, stage) for stage, modules in modules_by_stage(model, boundaries).items() for m in modules]
    for module, stage in pairs:
        for name, parameter in module.named_parameters(recurse=False):
            here = f"{names[module]}.{name}" if names[module] else name
            there, other = owner.setdefault(parameter, (here, stage))
            if other != stage and parameter.requires_grad:
                raise StageError(
                    f"Expected every parameter in one stage with update='immediate', but {here!r} is also "
                    f"{there!r}, in another stage (tied weights). Pass update='step'."
                )
