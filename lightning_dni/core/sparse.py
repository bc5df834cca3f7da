"""Sparse updates: in each step every stage runs its backward pass with some probability, or sits it out.

A stage that sits a step out hands nothing down, so the estimator below it is told no target; one that waits
for what the stage above leaves sits out with it. At `bp_lambda=1` the k-th stage from the top therefore
learns with probability p^k, which is what sparse backprop comes to (Jaderberg et al. 2017).

All gradients of a step are taken at the same weights and need nothing of what other stages do meanwhile, so
the order in which stages run (random in the paper) changes no number.
"""

from collections.abc import Iterable, Mapping

from lightning_dni.core.boundary import LAST_STAGE, choose_by_patterns
from lightning_dni.core.cut import Cut
from lightning_dni.core.estimator import Signal
from lightning_dni.core.randomness import derive_seed
from lightning_dni.errors import EstimatorError

_SEEDS = 2.0**63
"""Number of seeds that `derive_seed` gives."""


def choose_probabilities(boundaries: Iterable[str], value: float | Mapping[str, float]) -> dict[str, float]:
    """Probability of an update by boundary, and of the last stage, from one value or {pattern: value}.

    The last stage has no boundary above it: in a mapping it is `"(last stage)"`, and updates in every step
    where no pattern matches that.

    Raises:
        EstimatorError: A value is outside (0, 1].
        BoundaryError: No pattern matches a boundary.
    """
    if isinstance(value, Mapping):
        value = {**value, LAST_STAGE: value.get(LAST_STAGE, 1.0)}
    names = [*boundaries, LAST_STAGE]
    chosen = choose_by_patterns(names, value, "update_probability")
    for name, probability in chosen.items():
        if not isinstance(probability, (int, float)) or not 0.0 < probability <= 1.0:
            raise EstimatorError(
                f"Expected `update_probability` to be in (0, 1], but got {probability!r} for the stage below "
                f"boundary {name!r}. Pass one value for all stages, or {{boundary or pattern: value}}."
            )
    return {name: float(probability) for name, probability in chosen.items()}


def draw_asleep(probabilities: Mapping[str, float], seed: int, step: int) -> frozenset[str]:
    """Names of the boundaries whose stage below sits out `step`, each drawn from a stream of its own.

    What is drawn depends on nothing but the arguments: it is the same after a restart, in every replica, and
    whatever else draws random numbers.

    Args:
        probabilities: Of an update, by boundary.
        seed: The engine's.
        step: Number of the step.
    """
    return frozenset(
        name
        for name, probability in probabilities.items()
        if probability < 1.0 and derive_seed(seed, "update", name, step) >= probability * _SEEDS
    )


def sit_out(cut: Cut, keep_graph: bool, keep_values: bool) -> None:
    """Leave the stage below `cut` out of the step.

    Args:
        cut: The crossing above the stage.
        keep_graph: Whether the stage's graph is still asked for the true gradient.
        keep_values: Whether a report still asks what the stages below have passed on.
    """
    cut.asleep = cut.closed = True
    if not keep_graph:
        cut.outputs = []
    for parent in cut.stage.parents:
        if Signal.TARGET in parent.awaited:
            parent.record = None
        if not keep_values:
            parent.leaves = []
