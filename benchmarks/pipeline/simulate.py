"""The schedules on paper: when every stage starts and ends, for more stages than there are machines here.

python benchmarks/pipeline/simulate.py [--stages 2 4 8 16 32 64] [--jitter 0 0.2] [--latency 0 0.01]

The rules are those by which the stages wait in `lightning_dni/pipeline/engine.py`: for the activation of the
stage below, and for the target gradient of `staleness` updates ago from the stage above. Times are in units
of a stage's time for one batch (forward a third of it), drawn anew for every pass where there is jitter
(log-normal, of mean one); `latency` is that of a message. Exact schedules wait for their last microbatch.
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

FORWARD, BACKWARD = 1 / 3, 2 / 3
BATCHES, WARM_UP = 200, 100


class Times:
    """How long passes take.

    Args:
        jitter: Standard deviation of their logarithm.
        seed: Of the draws.
    """

    def __init__(self, jitter: float, seed: int = 0) -> None:
        self._jitter, self._random = jitter, random.Random(seed)

    def draw(self, mean: float) -> float:
        """One duration."""
        if not self._jitter:
            return mean
        return mean * self._random.lognormvariate(-(self._jitter**2) / 2, self._jitter)


def dni(stages: int, jitter: float, latency: float, staleness: int) -> float:
    """Share of the ideal under synthetic gradients."""
    times = Times(jitter)
    free = [0.0] * stages  # when a stage can begin the next batch
    sent: list[list[float]] = []  # when the target gradient of each batch leaves each stage
    starts: list[float] = []
    for t in range(BATCHES):
        arrived, leaves = 0.0, []
        for k in range(stages):
            start = max(free[k], arrived)
            forward = start + times.draw(FORWARD)
            arrived = forward + latency
            leaves.append(forward + times.draw(BACKWARD))
            if k == stages - 1:
                starts.append(start)
        sent.append(leaves)
        for k in range(stages):
            waits_for = t - staleness
            back = sent[waits_for][k + 1] + latency if k < stages - 1 and waits_for >= 0 else 0.0
            free[k] = max(leaves[k], back)
    return (BATCHES - 1 - WARM_UP) / (starts[-1] - starts[WARM_UP])


def exact(stages: int, jitter: float, latency: float, microbatches: int, in_flight: bool) -> float:
    """Share of the ideal under exact gradients: GPipe, or 1F1B with fewer microbatches `in_flight`."""
    times, begin = Times(jitter), 0.0
    orders = [order_of(k, stages, microbatches, in_flight) for k in range(stages)]
    batches = 20
    for _ in range(batches):
        begin = _exact_batch(orders, times, latency, microbatches, begin)
    return batches / begin


def order_of(stage: int, stages: int, microbatches: int, in_flight: bool) -> list[tuple[str, int]]:
    """Passes of one stage, in order."""
    ahead = min(microbatches, stages - stage) if in_flight else microbatches
    order = [("forward", i) for i in range(ahead)]
    for i in range(microbatches):
        order.append(("backward", i))
        if ahead + i < microbatches:
            order.append(("forward", ahead + i))
    return order


def _exact_batch(
    orders: Sequence[Sequence[tuple[str, int]]],
    times: Times,
    latency: float,
    microbatches: int,
    begin: float,
) -> float:
    """When the last stage to end a batch ends it, which all begin at once."""
    stages = len(orders)
    done: dict[tuple[str, int, int], float] = {}
    free, place = [begin] * stages, [0] * stages
    while any(place[k] < len(orders[k]) for k in range(stages)):
        for k in range(stages):
            while place[k] < len(orders[k]):
                what, i = orders[k][place[k]]
                neighbour = k - 1 if what == "forward" else k + 1
                needed = done.get((what, neighbour, i)) if 0 <= neighbour < stages else begin - latency
                if needed is None:
                    break
                mean = (FORWARD if what == "forward" else BACKWARD) / microbatches
                free[k] = max(free[k], needed + latency) + times.draw(mean)
                done[what, k, i] = free[k]
                place[k] += 1
    return max(free)


SCHEDULES = {
    "DNI, staleness 0": partial(dni, staleness=0),
    "DNI, staleness 1": partial(dni, staleness=1),
    "DNI, staleness 2": partial(dni, staleness=2),
    "DNI, staleness 4": partial(dni, staleness=4),
    "1F1B, 8 microbatches": partial(exact, microbatches=8, in_flight=True),
    "1F1B, 64 microbatches": partial(exact, microbatches=64, in_flight=True),
    "GPipe, 64 microbatches": partial(exact, microbatches=64, in_flight=False),
}


def main() -> None:
    """Print a table for every jitter and latency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.0, 0.2, 0.5])
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05])
    args = parser.parse_args()
    for jitter in args.jitter:
        for latency in args.latency:
            table = Table(
                title=f"share of the ideal in %, jitter {jitter:g}, latency {latency:g} stage times"
            )
            for heading in ("", *(f"{stages} stages" for stages in args.stages)):
                table.add_column(heading)
            for name, share in SCHEDULES.items():
                found = [100 * share(stages, jitter, latency) for stages in args.stages]
                table.add_row(name, *(f"{value:.1f}" for value in found))
            Console(width=110).print(table)


if __name__ == "__main__":
    main()
