"""Sums over processes: what one of them has not measured counts for none."""

import torch
import torch.distributed as dist
from processes import on_ranks

from lightning_dni.core.report import BoundaryReport
from lightning_dni.core.sums import BoundarySums


class Both:
    """Two processes whose rows count together."""

    def total(self, value):
        total = value.clone()
        dist.all_reduce(total)
        return total

    def totals(self, gradients):
        return {name: self.total(gradient) for name, gradient in gradients.items()}


def reports():
    """Of both ranks; the second has skipped its lesson, and the first alone was probed."""
    torch.manual_seed(0)
    synthetic, target, weight = torch.randn(4, 3), torch.randn(4, 3), {"w": torch.randn(5)}
    first = BoundaryReport(synthetic[:2], target[:2], target[:2], torch.tensor(1.0), True, weight, weight)
    return first, BoundaryReport(synthetic[2:], target[2:], None, None, True, {}, {})


def figures(rank):
    sums = BoundarySums()
    sums.update(reports()[rank])
    found = sums.figures(together=Both()).sums
    dist.barrier()  # nobody is left waiting
    return found


def test_what_one_process_has_not_measured_is_left_out_by_all():
    joint = BoundarySums()
    for report in reports():
        joint.update(report)
    expected = joint.figures().sums["target"]
    for found in on_ranks(figures, seconds=60):
        assert found.keys() == {"target"}
        torch.testing.assert_close(found["target"], expected)


def nothing(rank):
    sums, none = BoundarySums(), torch.zeros(0, 3)
    sums.update(BoundaryReport(none, none, None, torch.tensor(0.0), True, {}, {}))
    return sums.figures(together=Both()).sums


def test_of_no_row_at_all_nothing_is_said():
    """As at a truncation where every sequence begins anew: no error of 0, and no loss of 0 / 0."""
    assert on_ranks(nothing, seconds=60) == [{}, {}]
