"""Wall time, throughput and peak memory of training steps."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class StepClock:
    """Times the optimizer steps of a stretch; waits for the device only where it is stopped."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._elapsed = 0.0
        self._steps = 0
        self._samples = 0

    def run(self) -> None:
        """Go on, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self, device: torch.device) -> None:
        """Stand still until `run`, once `device` has done what it was given."""
        if self._since is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._elapsed += time.perf_counter() - self._since
        self._since = None

    def count(self, samples: int, stepped: bool) -> None:
        """Add a micro-batch of `samples`, the last of an optimizer step if `stepped`."""
        self._samples += samples
        self._steps += stepped

    def reset(self) -> None:
        """Forget everything and stand still."""
        self._since, self._elapsed, self._steps, self._samples = None, 0.0, 0, 0

    def read(self) -> dict[str, float]:
        """Seconds per optimizer step and samples per second; nothing where no step was timed."""
        if not self._steps or not self._elapsed:
            return {}
        values = {"dni_step_time": self._elapsed / self._steps}
        if self._samples:
            values["dni_samples_per_second"] = self._samples / self._elapsed
        return values


def samples_in(batch: Any) -> int:
    """Rows of the first tensor in `batch`; 0 where none is found.

    >>> samples_in({"id": "a", "image": [torch.zeros(8, 3)]})
    8
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if isinstance(batch, str):
        return 0
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    return next((found for found in map(samples_in, items) if found), 0)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes at the peak: of CUDA's allocator, else of the whole process; nothing where unknown."""
    if device.type == "cuda":
        return {"dni_peak_memory": float(torch.cuda.max_memory_allocated(device))}
    if sys.platform == "win32":
        return {}
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 1024
    return {"dni_peak_memory": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the device allows it; a process's own cannot be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
