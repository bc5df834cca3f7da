"""The picture: honest colours, readable axes, no trace in matplotlib's global state."""

import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import LogNorm

from lightning_dni.callbacks import Probe, draw_heatmap, write_heatmap
from lightning_dni.callbacks.heatmap import heatmap_pixels

BOUNDARIES = ("net.0", "net.1")


def probe(step, cosine, error):
    return Probe(step, dict(zip(BOUNDARIES, cosine, strict=True)), dict(zip(BOUNDARIES, error, strict=True)))


PROBES = [
    probe(49, (0.1, 0.9), (0.9, 0.25)),
    probe(99, (-0.5, 1.0), (1.5, math.inf)),
    probe(199, (math.nan, 0.5), (math.nan, 0.0)),
]


def meshes(figure):
    return [axes.collections[0] for axes in figure.axes[:2]]


def test_picture_holds_every_value_at_its_step_and_boundary():
    figure = draw_heatmap(PROBES)
    cosines, errors = (mesh.get_array() for mesh in meshes(figure))
    assert cosines.tolist() == [[0.1, -0.5, None], [0.9, 1.0, 0.5]]
    assert errors.tolist() == [[0.9, 1.5, None], [0.25, pytest.approx(1000), pytest.approx(0.001)]]
    assert np.array_equal(meshes(figure)[0].get_coordinates()[0, :, 0], [24, 74, 149, 249])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(BOUNDARIES)
    assert list(figure.axes[1].get_xticks()) == [49, 99, 199]


def test_a_note_stands_below_the_title():
    titles = [draw_heatmap(PROBES, *note).get_suptitle().splitlines() for note in ((), ("(in a pipeline)",))]
    assert titles[1] == [*titles[0], "(in a pipeline)"]
    assert len(titles[0]) == 1


def test_scales_are_fixed_or_say_where_they_end():
    figure = draw_heatmap(PROBES)
    cosine, error = (mesh.norm for mesh in meshes(figure))
    assert (cosine.vmin, cosine.vmax) == (-1, 1)
    assert isinstance(error, LogNorm)
    assert error.vmin * error.vmax == pytest.approx(1)  # as far below one as above it
    labels = [t.get_text() for t in figure.axes[3].get_yticklabels()]
    assert (labels[0], labels[-1]) == ("≤ 0.001", "≥ 1000")
    near = draw_heatmap([probe(0, (0.1, 0.2), (0.99, 1.01))])
    assert (meshes(near)[1].norm.vmin, meshes(near)[1].norm.vmax) == (0.5, 2)
    assert [t.get_text() for t in near.axes[3].get_yticklabels()] == ["0.5", "1", "2"]


def test_boundary_that_a_probe_has_not_measured_is_blank():
    late = [Probe(0, {"a": 0.5}, {"a": 0.5}), Probe(1, {"a": 0.5, "b": 0.1}, {"a": 0.5, "b": 0.1})]
    assert meshes(draw_heatmap(late))[0].get_array().tolist() == [[0.5, 0.5], [None, 0.1]]


def test_picture_of_many_boundaries_stays_a_picture():
    names = [f"transformer.layers.{k}" for k in range(60)]
    many = [Probe(s, dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.5)) for s in range(20)]
    height, width, channels = heatmap_pixels(many).shape
    assert (width, channels) == (1080, 4)
    assert height < 2100


def test_file_is_a_png_in_a_folder_made_for_it(tmp_path):
    path = write_heatmap(PROBES, tmp_path / "new" / "dni_gradients.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib.pyplot as plt

    before, backend = dict(mpl.rcParams), mpl.get_backend()
    draw_heatmap(PROBES)
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before
    assert mpl.get_backend() == backend


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match=r"Expected `probes` to hold at least one probe, but got none"):
        draw_heatmap([])
