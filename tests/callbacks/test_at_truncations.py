"""Callbacks at truncations, where the true gradient is never there: they say so, or tell of the target."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from strategies.test_truncations import Reader, chunks_of, fit, strategy

from lightning_dni import BPLambdaScheduler, GradientMonitor
from lightning_dni.callbacks import ImplicitLossMonitor, TrackingConditionMonitor


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrackingConditionMonitor(1),
        lambda: ImplicitLossMonitor(1),
        lambda: BPLambdaScheduler(lambda step: 0.5),
    ],
    ids=["tracking", "implicit", "lambda"],
)
def test_a_callback_that_needs_a_boundary_is_refused(make):
    callback = make()
    said = rf"Expected boundaries for {type(callback).__name__}, but got truncations alone, \['net.core'\]"
    with pytest.raises(MisconfigurationException, match=said):
        fit(Reader(), strategy(), chunks_of(2), callbacks=[callback])


def test_the_summary_tells_of_truncations_what_was_measured(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monitor = GradientMonitor(every_n_train_steps=1)
    fit(Reader(), strategy(), chunks_of(4), callbacks=[monitor], log_every_n_steps=1)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "net.core" in line and "│" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    errors = monitor.state_dict()["recent"]["dni_target_error/net_core"]
    assert len(errors) == 3
    assert cells == ["net.core", "Linear", "-", "-", "-", f"{sum(errors) / 3:.3g}", "-"]
