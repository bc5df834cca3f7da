"""Facts of one training step, and the face that the engine shows to callbacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dni.core.cut import Cut
from lightning_dni.core.figures import Figures
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.probe import Truth, observe, run_instruments, true_gradients
from lightning_dni.core.profile import Profile, no_profile
from lightning_dni.core.step import Step


@dataclass(frozen=True)
class BoundaryReport:
    """What happened at one boundary in one step; everything detached and on the model's device.

    Gradients are `[rows, features]`, in units of the per-row loss, leaves side by side and forward
    calls below one another. Weights are one tensor per parameter of the stage below, in units of the
    step's loss.

    Attributes:
        synthetic: The synthetic gradient as it was applied.
        target: The target gradient; None where nothing came back.
        true: The true gradient, on probe steps.
        loss: The estimator's training loss; None where it learns nothing.
        regresses: Whether that loss is the SG loss, whose scale is the variance of the target.
        applied_weights: Gradients that the stage's weights were given, on probe steps; empty where it sat
            the step out.
        true_weights: Their true gradients, on probe steps.
        measured: What each instrument that was asked for has measured, by name.
        input_error: Squared distance of the synthetic input to the activation, and the activation's square,
            summed; None where the activation was passed on.
    """

    synthetic: Tensor
    target: Tensor | None
    true: Tensor | None
    loss: Tensor | None
    regresses: bool
    applied_weights: Mapping[str, Tensor]
    true_weights: Mapping[str, Tensor]
    measured: Mapping[Instrument, Mapping[str, Tensor]] = field(default_factory=dict)
    input_error: Tensor | None = None


class Utilization(NamedTuple):
    """What a stage has spent its time on since its first training step, in seconds.

    Attributes:
        busy: In forward and backward passes and in the steps of optimizers.
        wait_in: Waiting for activations, targets or outputs.
        wait_out: Waiting until what it sends can leave.
        whole: All in all, without evaluation.
    """

    busy: float
    wait_in: float
    wait_out: float
    whole: float


@dataclass(frozen=True)
class StepReport:
    """What happened in one training step.

    Attributes:
        step: Number of the engine's training steps before this one.
        probed: Whether true gradients were measured.
        boundaries: Facts by boundary name, in forward order.
        figures: What other processes have measured, by boundary name; it is of earlier steps.
        utilization: What processes have spent their time on, by stage.
    """

    step: int
    probed: bool
    boundaries: Mapping[str, BoundaryReport]
    figures: Mapping[str, Figures] = field(default_factory=dict)
    utilization: Mapping[int, Utilization] = field(default_factory=dict)


@runtime_checkable
class Observable(Protocol):
    """An engine as callbacks see it: it measures on request and says what it measured."""

    def request_report(self) -> None:
        """Have the next training step keep its gradients for `last_report`."""

    def request_probe(self, instrument: Instrument | None = None) -> None:
        """Have the next training step measure the true gradients too, and what `instrument` measures."""

    @property
    def last_report(self) -> StepReport | None:
        """The report of the last step if one was requested for it, else None."""

    @property
    def report_delay(self) -> int:
        """Number of optimizer steps after which `last_report` tells of a step for which it was requested."""

    @property
    def probes_synchronously(self) -> bool:
        """Whether processes that else run ahead of each other have to meet for a probe."""

    @property
    def bp_lambda(self) -> dict[str, float]:
        """The lambda of BP(lambda) at each boundary."""

    @property
    def skipped(self) -> dict[str, int]:
        """Number of estimator updates by boundary that left something out; empty where none can."""

    def set_bp_lambda(self, value: float | Mapping[str, float]) -> None:
        """Change lambda from the next training step on, everywhere or by boundary or pattern."""

    def describe(self) -> dict[str, object]:
        """The configuration in primitives, for a logger's hyperparameters."""


@runtime_checkable
class HasEngine(Protocol):
    """Whatever exposes an engine: our strategies do."""

    @property
    def engine(self) -> Observable:
        """The engine of the running fit."""


def report_step(
    number: int,
    step: Step,
    cuts: Sequence[Cut],
    model: nn.Module,
    before: StepReport | None = None,
    profile: Profile = no_profile,
) -> StepReport:
    """Gather what the cuts of a finished step have kept; on probe steps, measure the true gradients.

    Args:
        number: The engine's number of the step.
        step: The step.
        cuts: Its cuts that count, topmost first.
        model: The model, whose parameters have names.
        before: What the step's earlier backward passes have shown.
        profile: Times the measurement.
    """
    truths: Mapping[Cut, Truth] = {}
    crossings: dict[str, list[Cut]] = {}
    for cut in reversed(cuts):
        crossings.setdefault(cut.boundary, []).append(cut)
    measured: dict[str, dict[Instrument, dict[str, Tensor]]] = {}
    if step.settings.probe:
        with profile("dni.probe"):
            keep = bool(step.settings.instruments)
            truths = true_gradients(cuts, step.top, retain_graph=keep, unspent=step.unspent)
            measured = {name: _measure(step, found, truths) for name, found in crossings.items()}
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    boundaries = {
        name: report_boundary(found, truths, names, measured.get(name)) for name, found in crossings.items()
    }
    earlier = {} if before is None else before.boundaries
    return StepReport(step=number, probed=step.settings.probe, boundaries={**earlier, **boundaries})


def _measure(
    step: Step, cuts: Sequence[Cut], truths: Mapping[Cut, Truth]
) -> dict[Instrument, dict[str, Tensor]]:
    if not step.settings.instruments:
        return {}
    scale = step.settings.loss_scale
    seen = [observe(cut, truths[cut], step.context_for, scale) for cut in cuts]
    return run_instruments(step.settings.instruments, seen)


def report_boundary(
    cuts: Sequence[Cut],
    truths: Mapping[Cut, Truth],
    names: Mapping[Tensor, str],
    measured: Mapping[Instrument, Mapping[str, Tensor]] | None = None,
) -> BoundaryReport:
    """Gather what the crossings of one boundary have kept.

    Args:
        cuts: The crossings.
        truths: True gradients of each of them; empty where none were measured.
        names: The names of parameters.
        measured: What instruments have measured.
    """
    losses = [cut.loss for cut in cuts if cut.loss is not None]
    ran = [cut for cut in cuts if cut.ran] if truths else []
    applied = [(v, g) for cut in ran for v, g in cut.param_grads]
    true = [(v, g) for cut in ran if cut in truths for v, g in truths[cut].weights]
    return BoundaryReport(
        synthetic=_below([_rows(cut, cut.synthetic) for cut in cuts]),
        target=_below([_rows(cut, cut.target) for cut in cuts]) if _heard(cuts) else None,
        true=_below([_rows(cut, _unscaled(cut, truths[cut])) for cut in cuts]) if truths else None,
        loss=torch.stack(losses).mean() if losses else None,
        regresses=cuts[0].installed.estimator.regresses,
        applied_weights=_sum_by_name(applied, names),
        true_weights=_sum_by_name(true, names),
        measured=measured or {},
        input_error=cuts[0].input_error,
    )


def with_rows_of(one: BoundaryReport | None, other: BoundaryReport) -> BoundaryReport:
    """`other` with the rows of `one`, of the same boundary and step, above its own."""
    if one is None or one.target is None or other.target is None:
        return other
    loss = other.loss
    if one.loss is not None and other.loss is not None:
        here, there = len(one.synthetic), len(other.synthetic)
        loss = (one.loss * here + other.loss * there) / max(1, here + there)
    return replace(
        other,
        synthetic=torch.cat([one.synthetic, other.synthetic]),
        target=torch.cat([one.target, other.target]),
        loss=loss,
    )


def _heard(cuts: Sequence[Cut]) -> bool:
    """Whether the stages above have left a target, be it zero, at every crossing."""
    return all(cut.delivered or cut.target is not None for cut in cuts)


def _unscaled(cut: Cut, truth: Truth) -> Sequence[Tensor] | None:
    if truth.gradient is None:
        return None
    return [g.to(torch.promote_types(g.dtype, torch.float32)) / cut.factor for g in truth.gradient]


def _rows(cut: Cut, gradient: Sequence[Tensor] | None) -> Tensor:
    like = [g.detach() for g in (cut.leaves if gradient is None else gradient)]
    if len({g.shape[0] for g in like}) > 1:  # an LSTM's output beside its [layers, batch, ...] state
        like = [g.reshape(1, -1) for g in like]
    flat = [g.flatten(1) if g.ndim > 1 else g.unsqueeze(1) for g in like]
    joined = torch.cat(flat, dim=1) if len(flat) > 1 else flat[0]
    return torch.zeros_like(joined) if gradient is None else joined


def _below(calls: Sequence[Tensor]) -> Tensor:
    """The rows of all calls below one another; shorter ones (shorter sequences) end in zeros."""
    width = max(rows.shape[1] for rows in calls)
    return torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in calls])


def _sum_by_name(
    gradients: Sequence[tuple[Tensor, Tensor]], names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for variable, gradient in gradients:
        name = names.get(variable)
        if name is not None:
            # a copy: the tensor itself may be the parameter's `.grad`, to be clipped and added to in place
            dense = gradient.to_dense() if gradient.is_sparse else gradient.clone()
            sums[name] = sums[name] + dense if name in sums else dense
    return sums
