"""What every engine of one stage has: its place in the pipeline, and the way of a batch through it."""

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_dni.core.base import Engine
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.pipeline.message import Kind, Links
from lightning_dni.pipeline.passage import Passage
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.splitting import StageRunner

T = TypeVar("T")

TRAINING = "training_step"
"""The step of the user's in which the model is trained."""


class StagedEngine(Engine):
    """An engine of one stage, beside those of the other stages.

    It takes the arguments of `DNIEngine`; `join` and `place` say which stage it is, once that is known.

    Attributes:
        stage: Number of the stage; 0 is given the batch alone.
        plan: What of the model belongs to which stage in a training step; None before one was seen.
    """

    def _reset(self) -> None:
        self.stage, self._staleness, self._links = 0, 0, Links()
        self.plan: StagePlan | None = None
        self._boundary: str | None = None
        self._below: str | None = None
        self._own: set[int] = set()
        self._passages: dict[str, Passage] = {}
        self._current: Passage | None = None
        self._evaluated = 0

    # ---- which stage this is

    def join(self, stage: int, links: Links, staleness: int) -> None:
        """Become stage `stage` of a pipeline.

        Args:
            stage: Number of this stage; 0 is given the batch alone.
            links: The ways to its neighbours.
            staleness: Number of updates after which a target gradient is learnt from.

        Raises:
            EstimatorError: `staleness` is not an integer of at least 0.
        """
        if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
            raise EstimatorError(
                f"Expected `staleness` to be an integer of at least 0, but got {staleness!r}. Pass 0 to wait "
                "for the target gradient of the same batch."
            )
        self.detach()  # a part that an earlier `place` has given: it leads to closed links
        self.stage, self._links, self._staleness = stage, links, staleness
        self._passages.clear()

    def place(self, plan: StagePlan, step: str = TRAINING) -> None:
        """Take over the part of this stage in a step of the user's, and hook the model.

        Args:
            plan: What of the model belongs to which stage in that step.
            step: Name of the step; other names than the training step's are evaluated only.
        """
        self.detach()
        runner = StageRunner(self._model, plan, self.stage)
        self._passages[step] = Passage(runner, plan, self.stage, self._links)
        if step == TRAINING:
            self.plan, order, k = plan, plan.boundaries, self.stage
            self._boundary = order[k] if k < len(order) else None
            self._below = order[k - 1] if k else None
            self._own = {id(p) for n, p in self._model.named_parameters() if plan.owner(n) == k}
            self._take_part(plan)
        self._use(step)

    def _take_part(self, plan: StagePlan) -> None:
        """Prepare for training steps of this plan."""

    @property
    def is_placed(self) -> bool:
        """Whether it is known what of the model belongs to this stage in a training step."""
        return TRAINING in self._passages

    def knows(self, step: str) -> bool:
        """Whether `place` was called for `step`."""
        return step in self._passages

    def attach(self) -> None:
        """Hook the model, if the stage is known."""
        if self.is_placed:
            self._use(TRAINING)

    def detach(self) -> None:
        """Take every hook off the model and forget the step in progress."""
        if self._current is not None:
            self._current.runner.detach()
        self._current = None

    def _use(self, step: str) -> Passage:
        """Hook the model for `step`, where it is hooked for another one."""
        if step not in self._passages:
            raise StageError(
                f"Expected the engine to know its part in {step!r}, but it knows {sorted(self._passages)}. "
                "Call `place` with the plan that `trace_stages` makes of one such step."
            )
        passage = self._passages[step]
        if passage is not self._current:
            self.detach()
            passage.runner.attach()
            self._current = passage
        return passage

    def _placed(self) -> Passage:
        assert self._current is not None
        return self._current

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self._boundary is None

    # ---- evaluation

    def evaluate(self, step: Callable[[], T], batch: Any = None, name: str = TRAINING) -> T | None:
        """Run the user's evaluation step `name` as this stage; None where it is not the last one."""
        passage = self._use(name)
        passage.receive(Kind.EVALUATE, self._evaluated, batch)
        result = passage.run(step, Kind.EVALUATE, self._evaluated)
        self._evaluated += 1
        return result
