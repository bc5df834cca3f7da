"""What a stage measures on request and sends up, and on the last stage the newest of what has come."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_dni.core.figures import Figures
from lightning_dni.core.report import BoundaryReport, StepReport, Utilization, report_boundary
from lightning_dni.core.sums import BoundarySums, Together
from lightning_dni.pipeline.clock import StageClock
from lightning_dni.pipeline.mail import Letter, Mail, Topic
from lightning_dni.pipeline.message import Links
from lightning_dni.pipeline.pending import Pending


class Reporting:
    """The reports of one stage.

    Figures of a training batch exist once its target gradients were learnt from. They go up with the next
    activation, and those of all stages about one batch arrive together.

    Args:
        stage: Number of the stage.
        boundaries: Names of all boundaries, upwards.
        clock: Says what the stage spends its time on.
        copies: The processes that run the same stage of other copies of the pipeline, if there are any.

    Attributes:
        skipped: What the other stages have skipped, by boundary, as far as it has come.
    """

    def __init__(
        self, stage: int, boundaries: Sequence[str], clock: StageClock, copies: Together | None = None
    ) -> None:
        self._stage, self._clock, self._copies = stage, clock, copies
        self.boundaries = tuple(boundaries)
        self._mail = Mail(self._deliver)
        self._open: dict[int, BoundarySums] = {}
        self._probed: dict[int, BoundaryReport] = {}
        self._step, self._figures, self._shares = 0, dict[int, Figures](), dict[int, Utilization]()
        self.skipped: dict[str, int] = {}

    def carry(self, links: Links) -> Links:
        """Ends of the same ways, whose activations carry letters along."""
        return self._mail.carry(links)

    # ---- measured here

    def tell_utilization(self, step: int) -> None:
        """Tell what this stage has spent its time on so far."""
        self._mail.post(Letter(Topic.UTILIZATION, self._stage, step, tuple(self._clock.read())))

    def begin(self, update: int) -> None:
        """What is learnt from a forward pass before `update` is to be reported."""
        self._open.setdefault(update, BoundarySums())

    def is_open(self, crossing: Pending) -> bool:
        """Whether a report was requested of this forward pass."""
        return crossing.update in self._open

    def keep(self, crossing: Pending, report: BoundaryReport) -> None:
        """A probe has shown everything about `crossing` but what its estimator will learn from it."""
        self._probed[crossing.step] = report

    def observe(self, crossing: Pending) -> None:
        """A target gradient was learnt from; `crossing` has kept what a report needs."""
        cut = crossing.cut
        if cut.target is None and cut.delivered:
            cut.target = cut.target_gradient()
        report = self._probed.pop(crossing.step, None)
        if report is None:
            report = report_boundary([cut], {}, {})
        self._open[crossing.update].update(replace(report, loss=cut.loss))

    def close(self, crossings: Sequence[Pending], update: int, skipped: Mapping[str, int]) -> None:
        """Send up what was observed of the forward passes that were learnt from after `update`."""
        for crossing in crossings:
            sums = self._open.pop(crossing.update, None)
            if sums is not None:
                figures = sums.figures(update - crossing.update, self._copies)
                count = skipped.get(crossing.cut.boundary, -1)
                said = (float(count), *figures.encode())
                self._mail.post(Letter(Topic.FIGURES, self._stage, crossing.step, said))
                self.tell_utilization(crossing.step)

    # ---- what has come

    def _deliver(self, letter: Letter) -> None:
        if letter.topic is Topic.UTILIZATION:
            self._shares[letter.stage] = Utilization(*letter.numbers)
            return
        self._step = max(self._step, letter.step)
        skipped, *numbers = letter.numbers
        self._figures[letter.stage] = Figures.decode(numbers)
        if skipped >= 0:
            self.skipped[self.boundaries[letter.stage]] = int(skipped)

    @property
    def newest(self) -> StepReport | None:
        """The newest figures of every boundary and stage; None where none have come."""
        if not self._figures and not self._shares:
            return None
        figures = {self.boundaries[stage]: self._figures[stage] for stage in sorted(self._figures)}
        probed = any("true" in each.sums for each in figures.values())
        return StepReport(self._step, probed, {}, figures, {**self._shares, self._stage: self._clock.read()})
