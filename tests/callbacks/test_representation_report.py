"""Pictures of representations hold what they are given, and cuts are where the network is cut."""

import pytest
import torch

from lightning_dni.callbacks import Representations, draw_representations
from lightning_dni.callbacks.layers import layers_before, short_names
from lightning_dni.callbacks.representation_report import draw_dissimilarities
from lightning_dni.demos import MLPClassifier


def test_picture_holds_every_matrix_and_curve():
    layers = ("a", "b", "c")
    curve = dict(zip(layers, (0.3, 0.2, 0.0), strict=True))
    found = Representations(5, curve, curve, curve, {"a": 0.6, "c": 0.4})
    matrices = {name: torch.full((4, 4), float(k)) for k, name in enumerate(layers)}
    figure = draw_representations(found, matrices, ["b"])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == list(layers)
    assert [axes.images[0].get_array().mean() for axes in shown] == [0, 1, 2]
    assert [axes.title.get_color() for axes in shown] == ["black", "firebrick", "black"]
    assert [len(axes.lines) for axes in shown] == [0, 1, 0]  # behind the cut
    distance, accuracy, norm = figure.axes[-3:]
    assert [list(line.get_ydata()) for line in distance.lines[1:]] == [[0.3, 0.2, 0.0]]
    assert distance.lines[0].get_xdata() == [2.5, 2.5]  # layers are counted from 1
    assert len(accuracy.lines) == 3
    assert (list(norm.lines[1].get_xdata()), list(norm.lines[1].get_ydata())) == ([1, 3], [0.6, 0.4])


def test_the_matrices_alone_lie_in_rows_with_a_line_behind_each_cut():
    matrices = {f"net.{k}": torch.full((4, 4), float(k)) for k in range(25)}
    figure = draw_dissimilarities(matrices, ["net.3", "net.24"])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [str(k) for k in range(1, 26)]
    assert [axes.images[0].get_array().mean() for axes in shown] == list(range(25))
    assert [k for k, axes in enumerate(shown) if axes.lines] == [3, 24]
    assert len({round(axes.get_position().y0, 3) for axes in shown}) == 2  # 20 in a row
    (scale,) = [axes for axes in figure.axes if axes.get_ylabel() == "dissimilarity"]
    assert scale.get_ylim() == (0, 1.5)
    assert scale.get_position().x0 > max(axes.get_position().x1 for axes in shown)


@pytest.mark.parametrize(
    ("layers", "boundaries", "before"),
    [
        (["net.hidden_0", "net.hidden_1", "net.hidden_2"], ["net.middle"], ["net.hidden_0"]),
        (["net.hidden_0", "net.middle", "net.hidden_1"], ["net.middle"], ["net.middle"]),
        (["net.hidden_0.0", "net.hidden_1.0"], ["net.hidden_0"], ["net.hidden_0.0"]),  # it lies inside
        (["net.hidden_0", "net.hidden_1"], ["net.hidden_1.0"], []),  # the cut is inside of the layer
        (["net", "net.hidden_0"], ["net.hidden_0"], ["net.hidden_0"]),
        (["net.hidden_1"], ["net.hidden_0"], []),
        (["net.hidden_0", "net.hidden_1"], [], []),
    ],
)
def test_a_cut_is_behind_the_last_layer_before_it(layers, boundaries, before):
    model = MLPClassifier(num_hidden=3, mark_middle=True)
    assert list(layers_before(model, layers, boundaries)) == before


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["net.hidden_1", "net.hidden_10"], ["1", "10"]),
        (["net.hidden_0", "net.hidden_9"], ["1", "10"]),  # as texts count
        (["net.0", "net.1.weight"], ["0", "1.weight"]),
        (["layer1", "layer2"], ["layer1", "layer2"]),
        (["net.0"], ["net.0"]),
        ([], []),
    ],
)
def test_names_are_shortened_by_what_all_begin_with(names, short):
    assert short_names(names) == short
