"""What the gradients at one boundary amount to in one step: sums, from which every metric of it follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FAMILIES = {
    "target": ("dot", "synthetic_square", "target_square", "difference_square"),
    "true": (
        *("dot", "synthetic_square", "true_square", "difference_square"),
        *("cosine_sum", "rows", "zero_rows"),
    ),
    "bootstrap": ("difference_square", "true_square"),
    "loss": ("sum", "rows"),
    "spread": ("square_sum", "rows"),
    "weights": ("dot", "applied_square", "true_square", "difference_square"),
    "input": ("difference_square", "real_square"),
}
"""What is summed, by what it tells about: synthetic against target and true gradient, target against true
gradient, the estimator's loss, the target around its mean, applied against true gradient of the weights,
synthetic against real input of the stage above."""

_DOUBLE = len(FAMILIES)


@dataclass(frozen=True)
class Figures:
    """Sums over everything at one boundary in one step.

    Attributes:
        sums: One vector per family of `FAMILIES` of which something was measured.
        dtype: The precision of what was measured.
        staleness: Number of updates of the stage from the forward pass until its target gradient was
            learnt from; None where there is no lag.
    """

    sums: Mapping[str, Float[Tensor, " entries"]]
    dtype: torch.dtype = torch.float32
    staleness: int | None = None

    def encode(self) -> tuple[float, ...]:
        """The same as plain numbers, which `decode` reads; waits for an accelerator."""
        names = [name for name in FAMILIES if name in self.sums]
        mask = sum(1 << place for place, name in enumerate(FAMILIES) if name in self.sums)
        mask |= (self.dtype == torch.float64) << _DOUBLE
        values = torch.cat([self.sums[name] for name in names]).tolist() if names else []
        lag = -1 if self.staleness is None else self.staleness
        return (float(mask), float(lag), *values)

    @classmethod
    def decode(cls, numbers: Sequence[float]) -> "Figures":
        """What `encode` has written."""
        mask, lag = int(numbers[0]), int(numbers[1])
        names = [name for place, name in enumerate(FAMILIES) if mask >> place & 1]
        values = torch.tensor(numbers[2:], dtype=torch.float64)
        vectors = torch.split(values, [len(FAMILIES[n]) for n in names])
        dtype = torch.float64 if mask >> _DOUBLE & 1 else torch.float32
        return cls(dict(zip(names, vectors, strict=True)), dtype, None if lag < 0 else lag)
