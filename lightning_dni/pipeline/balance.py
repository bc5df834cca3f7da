"""Choose boundaries such that the slowest stage of a pipeline is as fast as can be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from lightning_dni.errors import BoundaryError, StageError
from lightning_dni.pipeline.plan import StagePlan

SLACK = 0.05
"""Share of the slowest stage's time that plainer names may cost: two measurements differ by more."""

Cost = tuple[float, ...]
"""What a choice costs, most important first."""


@dataclass(frozen=True)
class Candidate:
    """A module whose output may be cut.

    Attributes:
        name: Its name.
        time: Seconds of the forward pass until its output is there.
        parameters: Elements of the trainable parameters of all modules that have begun until then.
    """

    name: str
    time: float
    parameters: int


@dataclass(frozen=True)
class Measured:
    """What measured forward passes have shown.

    Attributes:
        candidates: In forward order.
        time: Seconds of a whole forward pass.
        parameters: Elements of all trainable parameters.
    """

    candidates: tuple[Candidate, ...]
    time: float
    parameters: int


@dataclass(frozen=True)
class Balance:
    """The boundaries that were chosen.

    Attributes:
        boundaries: In forward order.
        shares: Share of the forward time of each stage, one more than boundaries.
        parameters: Elements of the parameters of each stage.
    """

    boundaries: tuple[str, ...]
    shares: tuple[float, ...]
    parameters: tuple[int, ...]

    def text(self) -> str:
        """A table of the stages, and how they were chosen."""
        names = [*self.boundaries, "(the loss)"]
        width = max(map(len, names))
        rows = [
            f"  {stage}  {name:<{width}}  {share:7.1%}  {count:>12,}"
            for stage, (name, share, count) in enumerate(
                zip(names, self.shares, self.parameters, strict=True)
            )
        ]
        return "\n".join(
            [
                f"boundaries='auto' has chosen {list(self.boundaries)}, by measured forward time alone: the "
                "backward pass and estimators are taken to grow with it. Pass the names to have them again.",
                f"     {'up to':<{width}}  forward    parameters",
                *rows,
            ]
        )


def balance(
    model: nn.Module, measured: Measured, stages: int, check: Callable[[Sequence[str]], StagePlan]
) -> Balance:
    """Choose `stages - 1` boundaries that can be cut.

    Args:
        model: What is to be cut.
        measured: What was seen of it.
        stages: Number of stages, at least 2.
        check: Sees that the model can be cut at all of some boundaries; raises where it cannot.

    Raises:
        BoundaryError: It can be cut at fewer places.
    """
    chooser = _Chooser(measured, stages, check)
    chosen, plan = chooser.choose()
    if plan is None:
        raise BoundaryError(
            f"Expected boundaries='auto' to find {stages - 1} places where {type(model).__name__} can be cut "
            f"into {stages} stages with trainable parameters in each, but got {len(chosen)}: "
            f"{[c.name for c in chosen]}.{chooser.reason} Use fewer processes, pass "
            "`stages=` the number in one copy of the pipeline, or name the boundaries."
        ) from chooser.refusal
    ends = [0.0, *(c.time for c in chosen), measured.time]
    shares = [(end - start) / measured.time for start, end in pairwise(ends)]
    counts = [0] * stages
    for name, parameter in model.named_parameters():
        counts[plan.owner(name)] += parameter.numel()
    return Balance(plan.boundaries, tuple(shares), tuple(counts))


def choose(candidates: Sequence[Candidate], whole: Candidate, stages: int) -> list[Candidate] | None:
    """Where to cut so that the slowest stage is as fast as can be; None where there are too few places.

    Among choices that are as good within 5 %, the one with the fewest levels in the names, and then the most
    even one. Each stage has trainable parameters.

    Args:
        candidates: In forward order.
        whole: The end of the forward pass.
        stages: Number of stages.

    >>> ends = [Candidate(name, float(time), time) for time, name in enumerate("abcde", 1)]
    >>> [c.name for c in choose(ends, Candidate("", 6.0, 6), 3)]
    ['b', 'd']
    """
    ends = [Candidate("", 0.0, 0), *candidates, whole]
    slowest = lambda before, below, end: (max(before[0], end.time - below.time),)
    fastest = _cheapest(ends, stages, (0.0,), slowest)
    if fastest is None:
        return None
    limit = fastest[0][0] * (1 + SLACK)

    def evenly(before: Cost, below: Candidate, end: Candidate) -> Cost | None:
        time = end.time - below.time
        return None if time > limit else (before[0] + end.name.count("."), before[1] + time * time)

    found = _cheapest(ends, stages, (0.0, 0.0), evenly)
    assert found is not None
    return [ends[i] for i in found[1][:-1]]


def _cheapest(
    ends: Sequence[Candidate],
    stages: int,
    start: Cost,
    add: Callable[[Cost, Candidate, Candidate], Cost | None],
) -> tuple[Cost, tuple[int, ...]] | None:
    """The cheapest way from the first end to the last in `stages` steps, of which `add` may refuse some."""
    ways: dict[int, tuple[Cost, tuple[int, ...]]] = {0: (start, ())}
    for _ in range(stages):
        ways = _one_step(ends, ways, add)
    return ways.get(len(ends) - 1)


def _one_step(
    ends: Sequence[Candidate],
    ways: Mapping[int, tuple[Cost, tuple[int, ...]]],
    add: Callable[[Cost, Candidate, Candidate], Cost | None],
) -> dict[int, tuple[Cost, tuple[int, ...]]]:
    """The cheapest way to each end that is one step further than those of `ways`."""
    further: dict[int, tuple[Cost, tuple[int, ...]]] = {}
    for at, (cost, path) in ways.items():
        for end in range(at + 1, len(ends)):
            if ends[end].parameters <= ends[at].parameters:
                continue
            grown = add(cost, ends[at], ends[end])
            if grown is not None and (end not in further or grown < further[end][0]):
                further[end] = grown, (*path, end)
    return further


class _Chooser:
    """Chooses, and leaves out what turns out not to be possible.

    Attributes:
        refusal: The last error that spoke against a candidate.
    """

    def __init__(self, measured: Measured, stages: int, check: Callable[[Sequence[str]], StagePlan]) -> None:
        self._left = [c for c in measured.candidates if 0 < c.parameters < measured.parameters]
        self._whole = Candidate("", measured.time, measured.parameters)
        self._stages, self._check = stages, check
        self._alone: dict[str, bool] = {}
        self.refusal: Exception | None = None

    @property
    def reason(self) -> str:
        """Why the last candidate was left out, as a sentence."""
        return "" if self.refusal is None else f" The last other one was refused: {self.refusal}"

    def choose(self) -> tuple[list[Candidate], StagePlan | None]:
        """The choice and its plan; without a plan, all the places of which there are too few."""
        while True:
            chosen = choose(self._left, self._whole, self._stages)
            if chosen is None:
                return self._longest(), None
            plan = self._plan(chosen)
            if plan is not None:
                return chosen, plan
            # what was refused together stands alone only where two of them do not go together
            wrong = [c for c in chosen if not self._passes(c)] or chosen[-1:]
            self._left = [c for c in self._left if c not in wrong]

    def _longest(self) -> list[Candidate]:
        """The most candidates that can be cut together."""
        self._left = [c for c in self._left if self._passes(c)]
        for stages in range(self._stages - 1, 1, -1):
            chosen = choose(self._left, self._whole, stages)
            if chosen is not None:
                return chosen
        return []

    def _passes(self, candidate: Candidate) -> bool:
        if candidate.name not in self._alone:
            self._plan([candidate])
        return self._alone[candidate.name]

    def _plan(self, chosen: Sequence[Candidate]) -> StagePlan | None:
        plan = None
        try:
            plan = self._check([c.name for c in chosen])
        except (BoundaryError, StageError) as error:
            self.refusal = error
        if len(chosen) == 1:
            self._alone[chosen[0].name] = plan is not None
        return plan
