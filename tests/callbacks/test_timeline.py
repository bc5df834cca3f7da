"""PipelineTimeline in one process: the picture, the common clock, and what it refuses."""

import logging
from pathlib import Path

import pytest
from fits import dni, fit, net

from lightning_dni.callbacks import PipelineTimeline
from lightning_dni.callbacks.gantt import COLORS, NAMES, draw_timeline
from lightning_dni.callbacks.pictures import write_figure
from lightning_dni.callbacks.timeline import _on_one_clock
from lightning_dni.pipeline.clock import Activity, Span


def spans(start, step=3):
    """Two of three seconds are work."""
    return [
        Span(start, start + 1, Activity.WAIT_IN, step),
        Span(start + 1, start + 3, Activity.FORWARD, step),
    ]


def test_every_stage_has_a_line_with_its_batches_and_its_share():
    figure = draw_timeline({0: spans(10.0), 1: spans(11.0)})
    (axes,) = figure.axes
    written = [(text.get_text(), text.get_position()[1]) for text in axes.texts]
    assert written == [("3", 0), ("67% busy", 0), ("3", 1), ("67% busy", 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stage 0", "stage 1"]
    bars = {
        tuple(path.get_extents().extents.round().tolist())
        for collection in axes.collections
        for path in collection.get_paths()
    }
    assert len(bars) == 4
    assert {(x0, x1) for x0, _, x1, _ in bars} == {(0, 1000), (1000, 3000), (1000, 2000), (2000, 4000)}
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [NAMES[Activity.FORWARD], NAMES[Activity.WAIT_IN]]


def test_every_activity_has_a_color_and_a_name():
    assert set(COLORS) == set(NAMES) == set(Activity)
    assert len(set(COLORS.values())) == len(Activity)


def test_the_picture_is_a_png():
    path = write_figure(draw_timeline({0: spans(0.0)}), Path("new") / "timeline.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="Expected `stages` to hold at least one span"):
        draw_timeline({0: [], 1: []})


def test_clocks_that_began_at_different_times_are_brought_together():
    here, there = (1, [5.0, 6.0, 7.0], spans(4.0)), (0, [105.1, 106.0, 107.0], spans(103.0))
    stages = _on_one_clock([here, there])
    assert list(stages) == [0, 1]
    assert [span.start for span in stages[0]] == [3.0, 4.0]
    assert [span.end for span in stages[1]] == [5.0, 7.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"first_step": -1}, "Expected `first_step` to be an integer of at least 0, but got -1"),
        ({"steps": 0}, "Expected `steps` to be an integer of at least 1, but got 0"),
        ({"steps": True}, "Expected `steps` to be an integer of at least 1, but got True"),
    ],
)
def test_bad_windows_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        PipelineTimeline(**options)


def test_one_process_has_no_stages_to_draw(caplog):
    with caplog.at_level(logging.INFO):
        fit(net(), dni(), callbacks=[PipelineTimeline(1, 2)])
    assert any("DNIStrategy has none" in record.getMessage() for record in caplog.records)
    assert not list(Path().rglob("dni_timeline.png"))
