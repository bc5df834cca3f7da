"""The schedules on paper: when every stage starts and ends, for more stages than there are machines here.

python benchmarks/pipeline/simulate.py [--stages 2 4 8 16 32 64] [--jitter 0 0.2] [--latency 0 0.01]

Exact schedules run in the order of `lightning_dni/pipeline/schedule.py` and wait for their last microbatch.
The rest are the rules by which stages wait in `lightning_dni/pipeline/engine.py`: for the activation of the
stage below, and for the target gradient of `staleness` updates ago from the stage above. Times are in units
of a stage's time for one batch (forward a third of it), drawn anew for every pass where there is jitter
(log-normal, of mean one); `latency` is that of a message.
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from lightning_dni.pipeline.schedule import Pass, order

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


def exact(stages: int, jitter: float, latency: float, schedule: str, microbatches: int) -> float:
    """Share of the ideal under exact gradients."""
    times, begin = Times(jitter), 0.0
    orders = [order(schedule, k, stages, microbatches) for k in range(stages)]
    batches = 20
    for _ in range(batches):
        begin = _exact_batch(orders, times, latency, microbatches, begin)
    return batches / begin


def _exact_batch(
    orders: Sequence[Sequence[Pass]],
    times: Times,
    latency: float,
    microbatches: int,
    begin: float,
) -> float:
    """When the last stage to end a batch ends it, which all begin at once."""
    stages = len(orders)
    done: dict[tuple[int, Pass], float] = {}
    free, place = [begin] * stages, [0] * stages
    while any(place[k] < len(orders[k]) for k in range(stages)):
        for k in range(stages):
            while place[k] < len(orders[k]):
                each = orders[k][place[k]]
                neighbour = k + 1 if each.backward else k - 1
                needed = done.get((neighbour, each)) if 0 <= neighbour < stages else begin - latency
                if needed is None:
                    break
                mean = (BACKWARD if each.backward else FORWARD) / microbatches
                free[k] = max(free[k], needed + latency) + times.draw(mean)
                done[k, each] = free[k]
                place[k] += 1
    return max(free)


SCHEDULES = {
    "DNI, staleness 0": partial(dni, staleness=0),
    "DNI, staleness 1": partial(dni, staleness=1),
    "DNI, staleness 2": partial(dni, staleness=2),
    "DNI, staleness 4": partial(dni, staleness=4),
    "1F1B, 8 microbatches": partial(exact, schedule="1f1b", microbatches=8),
    "1F1B, 64 microbatches": partial(exact, schedule="1f1b", microbatches=64),
    "GPipe, 64 microbatches": partial(exact, schedule="gpipe", microbatches=64),
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
