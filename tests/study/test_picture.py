"""The picture: what lies where, with which bars and names; `runs/toy/picture.png` is what is drawn."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from study.parts import CALL, rows, study

from lightning_dni.callbacks.pictures import pixels_of
from lightning_dni.study.configuration import read_study
from lightning_dni.study.folder import RunFolder
from lightning_dni.study.picture import draw_study

OUT = Path("runs/toy")


def drawn(picture, *words, text=CALL):
    """Run, and draw once more what has been drawn."""
    assert study(f"{text}picture: {picture}", *words) == 0
    pixels = imread(OUT / "picture.png")
    assert np.ptp(pixels[..., :3], axis=-1).max() > 0.5  # something in color beside paper and frame
    read = read_study("toy.yaml")
    results = {run.name: RunFolder(OUT / run.name).result for run in read.runs}
    return draw_study(read, {name: result for name, result in results.items() if result}, OUT)


def containers(axes):
    """Of each line with bars: its label, x, mean, and upper ends of its bars."""
    found = {}
    for each in axes.containers:
        line, _, (bars,) = each.lines
        tops = [segment[:, 1].max() for segment in bars.get_segments()]
        found[each.get_label()] = (line.get_xdata().tolist(), line.get_ydata().tolist(), tops)
    return found


def test_a_line_over_a_numeric_axis_has_means_and_bars():
    figure = drawn("{x: rate, y: final, line: kind, x_scale: log}")
    (axes,) = figure.axes
    found = containers(axes)
    assert list(found) == ["a", "b"]
    places, means, tops = found["a"]
    assert places == [0.5, 1.0]
    assert means == [0.5625, 1.5]
    assert tops == pytest.approx([mean + 0.5**0.5 for mean in means])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("rate", "final", "log")
    assert figure._suptitle.get_text() == "Half is less than one"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    dots = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "."]
    assert [0.0625, 1.0625] in dots


def test_named_values_lie_side_by_side():
    (axes,) = drawn("{x: kind, y: final, line: rate}").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    found = containers(axes)
    assert found["0.5"][0] != found["1.0"][0]  # beside each other, not one over the other
    middle = np.mean([found["0.5"][0], found["1.0"][0]], axis=0)
    assert middle.tolist() == [0, 1]  # their name is below the middle of them


def test_many_names_do_not_lie_over_each_other():
    text = "seeds: [0]\ngrid: {kind: [%s]}\ncall: study.parts.named\narguments: {}\n"
    names = [f"a rather long name ({k})" for k in range(14)]
    figure = drawn("{x: kind, y: final}", text=text % ", ".join(names))
    pixels_of(figure)  # the layout is solved when it is drawn
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    ticks = axes.transData.transform([(k, 0) for k in (0, 1)])[:, 0]
    angle = np.radians(axes.get_xticklabels()[0].get_rotation())
    height = axes.get_xticklabels()[0].get_size() * figure.dpi / 72
    assert (ticks[1] - ticks[0]) * np.sin(angle) > height


def test_several_axes_make_a_panel_per_combination():
    figure = drawn("{x: step, y: loss, panel: [rate, kind]}")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"rate: {rate}, kind: {kind}" for rate in ("0.5", "1.0") for kind in ("a", "b")]


def test_many_panels_are_small_enough_to_be_read_where_the_picture_is_shown_on_a_page():
    text = "seeds: [0]\ngrid: {kind: [a, b, c, d, e, f]}\ncall: study.parts.figures\narguments: {rate: 0.5}\n"
    figure = drawn("{x: step, y: loss, panel: kind}", text=text)
    assert figure.get_figwidth() <= 17
    pixels_of(figure)
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(a.x1 < b.x0 for a, b in pairwise(titles))


def test_curves_over_steps_in_panels():
    figure = drawn("{x: step, y: [loss, final], line: rate, panel: kind, y_scale: log, title: Curves}")
    assert [axes.get_title() for axes in figure.axes] == ["kind: a", "kind: b", "", ""]
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["0.5", "1.0"]
    half = axes.lines[0]
    assert half.get_xdata().tolist() == [0, 1, 2, 3]
    assert half.get_ydata().tolist() == [1.0, 0.75, 0.625, 0.5625]  # over the seeds 0 and 1
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(1.0 + 0.5**0.5)
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    ticks = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert len(ticks) > 2  # though it is less than two decades
    assert {"0.5", "1"} <= {*ticks}
    assert figure._suptitle.get_text() == "Curves"
    assert {line.get_marker() for line in axes.lines} == {"."}  # of so few values
    assert not figure.axes[2].lines  # `final` is no curve
    assert [text.get_text() for text in figure.axes[2].texts] == ["not measured"]
    assert not axes.texts


LAYERS = """
seeds: [0, 1]
grid: {kind: [a, b]}
call: study.parts.profile
arguments: {kind: "${run.kind}", seed: "${run.seed}"}
"""


def test_metrics_by_layer_are_drawn_over_the_layers_with_the_cuts_marked():
    words = "x: layer, y: [norm, error], line: kind, cuts: [net_9]"
    figure = drawn(f"{{{words}}}", text=LAYERS)
    norm, error = figure.axes
    assert [label.get_text() for label in error.get_xticklabels()] == ["2", "9", "10"]  # as one counts
    assert [line.get_label() for line in norm.lines[:2]] == ["a", "b"]
    assert norm.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert norm.lines[0].get_ydata().tolist() == [2.5, 9.5, 10.5]  # over the seeds 0 and 1
    assert norm.lines[1].get_ydata().tolist() == [-1.5, -8.5, -9.5]
    band = norm.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(10.5 + 0.5**0.5)
    assert error.lines[0].get_xdata().tolist() == [1]  # the others have none
    for axes in (norm, error):
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [[1.5, 1.5]]
    assert error.get_xlabel() == "layer"


def test_layers_whose_names_begin_at_0_are_counted_from_1():
    text = f"{LAYERS}".replace('${run.seed}"}', '${run.seed}", lowest: 0}')
    (axes,) = drawn("{x: layer, y: norm, line: kind}", text=text).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "11"]
    assert axes.get_xlabel() == "layer, counted from 1"
    assert axes.lines[0].get_ydata().tolist() == [0.5, 9.5, 10.5]


def test_metrics_may_have_words_of_their_own():
    figure = drawn("{x: step, y: {loss: squared error, final: last}}")
    assert [axes.get_ylabel() for axes in figure.axes] == ["squared error", "last"]
    layers = drawn("{x: layer, y: {norm: the norm}}", text=LAYERS.replace("kind: [a, b]", "kind: [a]"))
    assert [axes.get_ylabel() for axes in layers.axes] == ["the norm"]


def test_a_bar_that_ends_near_zero_does_not_stretch_a_log_axis():
    text = CALL.replace("[0.5, 1.0]", "[0.71, 1.0]")
    figure = drawn("{x: rate, y: final, panel: kind, y_scale: log}", text=text)
    for axes in figure.axes:
        low, _ = axes.get_ylim()
        assert low == pytest.approx(0.71**4 / 1.5)  # the least value is 0.254, and the bar ends at 0.047


def test_one_metric_may_have_a_scale_of_its_own():
    figure = drawn("{x: step, y: [loss, final], y_scale: {loss: log}}")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    (layers,) = drawn("{x: layer, y: norm, line: kind, y_scale: {norm: log}}", text=LAYERS).axes
    assert layers.get_yscale() == "log"


def test_an_axis_that_is_called_layer_is_one():
    text = CALL.replace("rate", "layer").replace("figures", "profile_of")
    (axes,) = drawn("{x: layer, y: final, line: kind}", text=text).axes
    assert containers(axes)["a"][0] == [0.5, 1.0]


def test_a_metric_that_no_layer_has_is_named(capsys):
    assert study(f"{LAYERS}picture: {{x: layer, y: [norm, length]}}") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "but no run has logged 'length'" in said
    assert "'norm'" not in said


def test_images_of_runs_are_set_one_below_the_other_per_line():
    words = "x: layer, y: norm, line: kind, images: drawn_*.png"
    figure = drawn(f"{{{words}}}", text=LAYERS)
    first, second, chart = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["kind: a, seed 0", "kind: b, seed 0"]
    for axes, kind in ((first, "a"), (second, "b")):
        expected = imread(OUT / f"kind={kind},seed=0/drawn_10.png")  # after drawn_9.png
        assert np.array_equal(axes.images[0].get_array(), expected)
    assert chart.get_ylabel() == "norm"
    without = drawn("{x: layer, y: norm, line: kind, images: none_*.png}", text=LAYERS)
    assert len(without.axes) == 1


def test_curves_lie_at_the_steps_that_the_function_gives():
    text = "seeds: [0]\ncall: study.parts.at_steps\narguments: {steps: [60, 120]}\n"
    (axes,) = drawn("{x: step, y: loss}", text=text).axes
    assert axes.lines[0].get_xdata().tolist() == [60, 120]
    assert axes.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert axes.get_xlabel() == "step"
    assert "step" not in rows()[0]  # no metric


def test_a_curve_that_is_longer_than_its_steps_fails(capsys):
    assert study("seeds: [0]\ncall: study.parts.at_steps\narguments: {steps: [60]}\n") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Expected the curve `step` to have an entry for each of 'loss', but it has 1 for 2." in said


def test_a_cell_without_a_result_is_left_out():
    figure = drawn("{x: rate, y: final, line: kind}", "--skip", "{rate: 1.0, kind: b}")
    assert containers(figure.axes[0])["a"][0] == [0.5, 1.0]
    assert containers(figure.axes[0])["b"][0] == [0.5]


def test_without_a_picture_none_is_drawn():
    assert study(CALL) == 0
    assert not (OUT / "picture.png").exists()


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_runs_that_have_diverged_are_in_the_table_and_not_in_the_way(value, capsys):
    picture = "picture: {x: rate, y: final, y_scale: log}"
    assert study(f"{CALL}{picture}", "--arguments.final", value, "--only.kind", "a") == 0
    assert ["0.5", "a", value.replace(".", "")] in [
        re.findall(r"[^│ ]+", line)[:3] for line in capsys.readouterr().out.splitlines()
    ]
    assert (OUT / "picture.png").exists()


def test_names_are_shown_as_they_are_with_dollars_and_brackets(capsys):
    text = CALL.replace("Half is less than one", "'Error [in %] for $5, $^'")
    text = text.replace("kind: [a, b]", "kind: ['$^$', '[red]']")
    figure = drawn("{x: rate, y: final, line: kind}", text=text)
    (legend,) = figure.legends
    assert [each.get_text() for each in legend.get_texts()] == [r"\$^\$", "[red]"]
    said = capsys.readouterr().out
    assert "toy: Error [in %] for $5, $^" in said
    assert "│ [red] │" in said
