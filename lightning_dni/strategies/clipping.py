"""How the stages of a pipeline clip the norm of gradients of which each holds a part."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dni.pipeline.norms import LaggedNorm
from lightning_dni.strategies._compat import MisconfigurationException

EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""

Clip = Callable[[list[Tensor], float], None]
"""Clips the gradients of parameters, of which other stages hold some, to a norm."""


def lags_norm(clip_norm: str, exact: bool) -> bool:
    """Whether stages clip by the norm over all of them.

    Args:
        clip_norm: As in `DNIPipelineStrategy`.
        exact: Whether an exact schedule trains them, whose stages tell each other in any case.

    Raises:
        MisconfigurationException: There is no such way, or it does not go with the schedule.
    """
    if clip_norm not in ("stage", "lagged"):
        raise MisconfigurationException(
            f"Expected `clip_norm` to be 'stage' or 'lagged', but got {clip_norm!r}. Leave it out, and every "
            "stage clips to its share; pass 'lagged' to clip by the norm over all stages some updates ago."
        )
    if exact and clip_norm != "stage":
        raise MisconfigurationException(
            f"Expected no `clip_norm` with an exact schedule, but got {clip_norm!r}: it clips by the norm "
            "over all stages in any case. Leave it out."
        )
    return clip_norm == "lagged"


def clip_share(stages: int) -> Clip:
    """Clip every stage to its share, so that the norm over all is within the limit; nobody tells anything."""

    def clip(parameters: list[Tensor], max_norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, max_norm / math.sqrt(stages))

    return clip


def clip_lagged(stages: int, norm: LaggedNorm) -> Clip:
    """Clip by the norm that all stages had `norm.lag` updates ago, and before that by their shares."""
    share = clip_share(stages)

    def clip(parameters: list[Tensor], max_norm: float) -> None:
        due = norm.pass_on(_total(_norms(parameters)).double().square())
        if due is None:
            share(parameters, max_norm)
        else:
            _scale(parameters, torch.tensor(min(1.0, max_norm / (math.sqrt(due) + EPSILON))))

    return clip


def clip_together(speaks: bool, device: torch.device, call: Callable[[Callable[[], Any]], Any]) -> Clip:
    """Clip by the norm over all stages, for which they wait: bit for bit as one process does.

    Args:
        speaks: Whether this process is the one of its stage that is asked.
        device: Where the backend takes tensors.
        call: Calls a collective to which all processes come.
    """

    def clip(parameters: list[Tensor], max_norm: float) -> None:
        found = [p.grad is not None for p in parameters]
        told = torch.zeros(2, len(parameters), dtype=torch.float64, device=device)
        if speaks and any(found):
            told[0, torch.tensor(found, device=device)] = torch.stack(_norms(parameters)).to(told)
            told[1] = torch.tensor(found, device=device)
        call(lambda: dist.all_reduce(told))
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters))
        total = _total(list(told[0, told[1] > 0].to(dtype)))
        _scale(parameters, torch.clamp(max_norm / (total + EPSILON), max=1.0))

    return clip


def _norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return list(torch._foreach_norm(gradients, 2.0) or ()) if gradients else []  # none in a frozen stage


def _total(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _scale(parameters: Sequence[Tensor], factor: Tensor) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0]))
