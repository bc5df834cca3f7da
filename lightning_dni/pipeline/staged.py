"""What every engine of one stage has: its place in the pipeline, and the way of a batch through it."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from lightning_dni.core.base import Engine
from lightning_dni.core.consumer import join_alignments
from lightning_dni.core.instrument import Instrument
from lightning_dni.core.profile import Profile, no_profile
from lightning_dni.core.randomness import derive_seed, reseed, seeded
from lightning_dni.core.report import StepReport
from lightning_dni.core.sums import Together
from lightning_dni.errors import EstimatorError, StageError
from lightning_dni.pipeline.clock import StageClock
from lightning_dni.pipeline.message import Kind, Links, Message
from lightning_dni.pipeline.passage import Passage
from lightning_dni.pipeline.plan import StagePlan
from lightning_dni.pipeline.reporting import Reporting
from lightning_dni.pipeline.splitting import StageRunner

T = TypeVar("T")

ALIKE = (
    "Give every process the same number of batches, and do on every rank, at the same batch, whatever waits "
    "for all of them: saving a checkpoint, `trainer.log_dir`, ending an epoch by returning -1."
)

EVALUATION = "evaluation"
"""The streams from which evaluations draw."""

TRAINING = "training_step"
"""The step of the user's in which the model is trained."""


class StagedEngine(Engine):
    """An engine of one stage, beside those of the other stages.

    It takes the arguments of `DNIEngine`; `join` and `place` say which stage it is, once that is known.

    Attributes:
        stage: Number of the stage; 0 is given the batch alone.
        plan: What of the model belongs to which stage in a training step; None before one was seen.
        clock: What this stage spends its time on.
        schedule: When a stage works on what.
        moved: Fingerprint of what the batch was before it was moved to a device; 0 where it is not needed.
    """

    schedule = "dni"

    def _reset(self) -> None:
        if self._update != "step" or any(p < 1 for p in self._update_probability.values()):
            raise EstimatorError(
                "Expected no `update` and no `update_probability` in a pipeline, but got one: every stage "
                "runs and updates by itself, in every batch. Leave them out."
            )
        if self._inputs is not None:
            raise EstimatorError(
                "Expected no `synthetic_inputs` in a pipeline, but got some: a stage goes on from what the "
                "one below has sent. Leave them out, or train in one process: strategy='dni'."
            )
        if self._truncations:
            raise EstimatorError(
                f"Expected no `truncations` in a pipeline, but got {list(self._truncations)}: a state stays "
                "in its stage. Train in one process."
            )
        self.clock = StageClock()
        self.time_with(no_profile)
        self._reporting = Reporting(0, (), self.clock)
        self._others: list[dict[str, object]] = []
        self.stage, self._staleness, self._links = 0, 0, Links()
        self._copy = 0, 1
        self._home: torch.device | None = None
        self.plan: StagePlan | None = None
        self._boundary: str | None = None
        self._below: str | None = None
        self._own: set[int] = set()
        self._passages: dict[str, Passage] = {}
        self._current: Passage | None = None
        self._evaluated = self._meetings = self.moved = 0

    # ---- which stage this is

    def join(
        self,
        stage: int,
        links: Links,
        staleness: int,
        device: torch.device | None = None,
        copies: Together | None = None,
        copy: tuple[int, int] = (0, 1),
    ) -> None:
        """Become stage `stage` of a pipeline.

        Args:
            stage: Number of this stage; 0 is given the batch alone.
            links: The ways to its neighbours.
            staleness: Number of updates after which a target gradient is learnt from.
            device: Where the stage computes; None: where the model is.
            copies: The processes that run the same stage of other copies of the pipeline, if there are any.
            copy: Number of the copy to which this process belongs, and how many there are.

        Raises:
            EstimatorError: `staleness` is not an integer of at least 0, or gradients are delayed otherwise.
        """
        if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
            raise EstimatorError(
                f"Expected `staleness` to be an integer of at least 0, but got {staleness!r}. Pass 0 to wait "
                "for the target gradient of the same batch."
            )
        self.detach()  # a part that an earlier `place` has given: it leads to closed links
        self.stage, self._staleness, self._copy = stage, staleness, copy
        self._reporting = Reporting(stage, (), self.clock, copies)
        self._links = self._reporting.carry(self.clock.watch(links))
        self._others = []
        self._home = device
        self._device = self._find_device()
        self._passages.clear()
        self._meetings = 0
        self._take_staleness()

    def place(self, plan: StagePlan, step: str = TRAINING) -> None:
        """Take over the part of this stage in a step of the user's, and hook the model.

        Args:
            plan: What of the model belongs to which stage in that step.
            step: Name of the step; other names than the training step's are evaluated only.
        """
        self.detach()
        runner = StageRunner(self._model, plan, self.stage, self._device)
        self._passages[step] = Passage(runner, plan, self.stage, self._links)
        if step == TRAINING:
            self.plan, order, k = plan, plan.boundaries, self.stage
            self._reporting.boundaries = order
            self.clock.restart()
            self._boundary = order[k] if k < len(order) else None
            self._below = order[k - 1] if k else None
            self._own = {id(p) for n, p in self._model.named_parameters() if plan.owner(n) == k}
            self._take_part(plan)
        self._use(step)

    def _find_device(self) -> torch.device:
        return self._home or super()._find_device()

    def _take_staleness(self) -> None:
        """Prepare for this lag."""

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

    def drain(self) -> None:
        """Receive what is under way to this stage; nothing is between two batches, but with a lag."""

    # ---- random numbers: before its own part a stage draws what stage 0 draws, then from its own stream

    def _drawing(self, number: int, what: str = "stage") -> AbstractContextManager[None]:
        """A block around step `number` in which it draws from streams; a training step as in one process."""
        if self._rng != "stage":
            return nullcontext()
        return seeded(derive_seed(self._pool.seed, what, None, 0, number, *self._replica), self._device)

    def _draw_own(self, number: int, *name: object) -> None:
        """Go over to the stream of this stage, or to that of another name."""
        if self._rng == "stage":
            name = name or ("stage", self._below)
            seed = derive_seed(self._pool.seed, *name, 1, number, *self._replica)
            reseed(seed, self._device)

    # ---- evaluation

    def evaluate(self, step: Callable[[], T], batch: Any = None, name: str = TRAINING) -> T | None:
        """Run the user's evaluation step `name` as this stage; None where it is not the last one."""
        passage, number = self._use(name), self._evaluated
        own = partial(self._draw_own, number, EVALUATION, self.stage)
        with self.clock.stopped():
            passage.receive(Kind.EVALUATE, number, batch, self.moved)
            # a stage draws less than the whole step, and all have to shuffle alike afterwards
            with self._drawing(number, EVALUATION):
                result = passage.run(step, Kind.EVALUATE, number, on_receive=own)
        self._evaluated += 1
        return result

    # ---- what others may see

    def time_with(self, profile: Profile) -> None:
        """Have `profile`, too, time the phases of a step."""
        self.profile = self.clock.around(profile)

    def request_report(self) -> None:
        """Have the next training step measured, and the last stage told of it and of this stage's time."""
        super().request_report()
        self._reporting.tell_utilization(self._steps)

    def request_probe(self, instrument: Instrument | None = None) -> None:
        """The same with true gradients, for which all stages wait for each other.

        Raises:
            StageError: Something else is to be measured, too.
        """
        if instrument is not None:
            raise StageError(
                "Expected a probe of the gradients alone in a pipeline, but got an instrument, whose figures "
                "the stages have no way to send up. Measure with it in one process (DNIStrategy, DNIEngine), "
                "or leave it out."
            )
        super().request_probe()
        self._reporting.tell_utilization(self._steps)

    @property
    def last_report(self) -> StepReport | None:
        """On the last stage the newest figures of every stage that have come, else None."""
        return self._reporting.newest

    @property
    def report_delay(self) -> int:
        """Number of optimizer steps after which `last_report` tells of a step for which it was requested."""
        return self._staleness + 1

    @property
    def probes_synchronously(self) -> bool:
        """Whether processes that else run ahead of each other have to meet for a probe."""
        return True

    def introduce(self, others: Sequence[Mapping[str, object]]) -> None:
        """Have `describe` tell of all stages.

        Args:
            others: What it has told on each of them, upwards.
        """
        self._others = [dict(each) for each in others]

    def describe(self) -> dict[str, object]:
        """The configuration in primitives; of all stages, once they were introduced."""
        here = super().describe() | self._describe_part()
        for each in self._others:
            here = _joined(here, each)
        stages = {} if self.plan is None else {"stages": self.plan.stages}
        return {**here, "schedule": self.schedule, "staleness": self._staleness, **stages}

    def _describe_part(self) -> dict[str, object]:
        """What else there is to tell of this stage."""
        return {}

    # ---- where all stages come together

    def meet(self, what: str) -> None:
        """See that every stage comes to the same place, before it waits there for all of them.

        Args:
            what: What comes next; every stage says the same.

        Raises:
            StageError: The stage below is at a batch, or comes together for something else.
        """
        self._meetings += 1
        mark = zlib.crc32(what.encode())
        if self._links.activation_in is not None:
            found = self._links.activation_in.receive()
            check_meeting(found, self.stage, self._meetings, mark, what)
        if self._links.activation_out is not None:
            self._links.activation_out.send(Message(self._meetings, Kind.MEET, fingerprint=mark))


def _joined(one: Mapping[str, object], other: Mapping[str, object]) -> dict[str, object]:
    """Two descriptions as one: facts by boundary side by side, in the order of `other` after `one`."""
    joined = dict(one)
    for key, value in other.items():
        known = joined.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            joined[key] = {**known, **value}
        elif key == "feedback_alignment":
            joined[key] = join_alignments(str(known), str(value))
        elif key == "estimator_optimizers" and isinstance(known, list) and isinstance(value, list):
            joined[key] = known + [each for each in value if each not in known]
    return joined


def check_meeting(found: Message, stage: int, number: int, mark: int, what: str) -> None:
    """See that the stage below comes to the same meeting.

    Raises:
        StageError: It does not.
    """
    if found.kind is not Kind.MEET:
        raise StageError(
            f"Expected stage {stage - 1} to wait for all stages as stage {stage} does ({what}), but got its "
            f"{found.kind.name.lower()} batch {found.step}. {ALIKE}"
        )
    if (found.step, found.fingerprint) != (number, mark):
        raise StageError(
            f"Expected stage {stage - 1} to wait for the same as stage {stage} ({what}, time {number}), "
            f"but got something else (time {found.step}). {ALIKE}"
        )
