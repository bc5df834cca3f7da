"""Pictures of losses hold the numbers that they are given, and leave matplotlib as it was."""

import matplotlib as mpl
import numpy as np
import torch

from lightning_dni.analysis import LossSurfaces, descend, loss_surface, plane
from lightning_dni.callbacks import draw_counter_example, draw_loss_surfaces
from lightning_dni.callbacks.pictures import pixels_of


def surfaces(known=True):
    points = plane((-1.0, -2.0), (1.0, 2.0), side=5)
    x, y = points.double().unbind(1)
    true = torch.stack([x.square() + y, x - y])
    return LossSurfaces(points, true if known else None, {"net.1": 2 * true + 3, "net.3": -true})


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_every_panel_holds_its_surface_on_a_scale_of_its_own():
    given = surfaces()
    figure = draw_loss_surfaces(given)
    found = panels(figure)
    assert len(found) == 6
    columns = [given.true, given.implicit["net.1"], given.implicit["net.3"]]
    for k, axes in enumerate(found):
        (image,) = axes.images
        values = columns[k % 3][k // 3].numpy()
        # rows of the picture are the second input, from below
        assert np.array_equal(np.asarray(image.get_array()), values.reshape(5, 5).T)
        assert image.get_extent() == [-1.25, 1.25, -2.5, 2.5]
        assert (image.norm.vmin, image.norm.vmax) == (values.min(), values.max())
    assert found[0].get_title() == "true loss\n-2 to 3"
    assert found[1].get_title() == "net.1\n-1 to 9, corr. 1.00"
    assert found[5].get_title() == "-3 to 3, corr. -1.00"


def test_without_a_true_loss_there_is_no_column_and_no_correlation():
    found = panels(draw_loss_surfaces(surfaces(known=False)))
    assert [axes.get_title() for axes in found] == ["net.1\n-1 to 9", "net.3\n-3 to 2", "-3 to 9", "-3 to 3"]


def test_several_are_drawn_one_below_the_other():
    first, then = (
        surfaces(),
        surfaces()._replace(implicit={"net.1": torch.ones(2, 25), "net.3": -surfaces().true}),
    )
    found = panels(draw_loss_surfaces({"step 1": first, "step 2": then}))
    assert len(found) == 2 * 2 * 3
    assert [axes.get_ylabel().split("\n")[0] for axes in found[::3]] == [
        f"step {step}, label {label}" for step in (1, 2) for label in (0, 1)
    ]
    assert np.array_equal(np.asarray(found[7].images[0].get_array()), np.ones((5, 5)))
    assert found[0].get_title() == "true loss\n-2 to 3"
    assert found[6].get_title() == "-2 to 3"


def test_a_flat_surface_is_drawn_too():
    flat = surfaces()._replace(implicit={"net.1": torch.zeros(2, 25)})
    assert pixels_of(draw_loss_surfaces(flat)).shape[2] == 4


def test_the_counter_example_shows_the_surface_the_region_and_both_ways():
    runs = {m: descend((1.0, 2.5, 0.0), m, steps=300) for m in ("constant", "none")}
    figure = draw_counter_example(loss_surface(points=31), runs)
    plan, curve = panels(figure)
    for k, run in enumerate(runs.values()):
        way, start, end = plan.lines[3 * k : 3 * k + 3]
        assert np.array_equal(way.get_xdata(), run.parameters[:, 0].numpy())
        assert np.array_equal(way.get_ydata(), run.parameters[:, 1].numpy())
        assert (start.get_xdata()[0], end.get_xdata()[0]) == (way.get_xdata()[0], way.get_xdata()[-1])
        assert np.array_equal(curve.lines[k].get_ydata(), run.losses.numpy())
    (legend,) = figure.legends  # outside, where it covers no curve
    assert "constant: ends at 6" in [text.get_text() for text in legend.get_texts()]
    pixels_of(figure)  # the layout is solved when it is drawn
    assert legend.get_window_extent().y1 < min(axes.get_window_extent().y0 for axes in (plan, curve))


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    pixels_of(draw_loss_surfaces(surfaces()))
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == before
