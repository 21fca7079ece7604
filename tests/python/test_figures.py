# SPDX-License-Identifier: Apache-2.0
"""The figures: what they show, and that nothing overlaps or is cut at 8 and at 256 experts."""

import itertools

import pytest
import torch

from equipoise import figures, metrics


def counts(steps, layers, experts):
    return (torch.rand(steps, layers, experts).pow(4) * 1000).long() + 1


def check_layout(figure):
    """Texts are inside the figure, and those of an axis do not touch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, page = canvas.get_renderer(), figure.bbox
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            labels = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            low, high = sorted(axis.get_view_interval())
            boxes = [
                label.get_window_extent(renderer)
                for label, place in zip(labels, axis.get_ticklocs(), strict=False)
                if low <= place <= high
            ]
            for a, b in itertools.pairwise(boxes):
                assert not a.overlaps(b), (ax.get_title(), axis.axis_name)
            for box in [*boxes, axis.label.get_window_extent(renderer)]:
                assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y1 <= page.y1
    return figure


@pytest.mark.parametrize("experts", [8, 256])
def test_heatmap(experts):
    runs = {"none": counts(30, 2, experts), "loss-free": counts(30, 2, experts)}
    figure = check_layout(figures.load_heatmap(runs))
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in panels[:2]] == ["none", "loss-free"]
    shown = panels[0].images[0].get_array()  # [E, S] of the first layer, fullest last load on top
    load = runs["none"][:, 0].double()
    load = load * experts / load.sum(-1, keepdim=True)
    order = load[-10:].sum(0).argsort(descending=True)
    torch.testing.assert_close(torch.as_tensor(shown.data), load[:, order].T)


def test_heatmap_puts_neighbouring_steps_together():
    counts_of_run = counts(100, 1, 4)
    figure = figures.load_heatmap({"run": counts_of_run}, columns=10)
    assert figure.axes[0].images[0].get_array().shape == (4, 10)


def test_curves_are_the_metrics():
    runs = {"a": counts(12, 3, 8), "b": counts(12, 3, 8)}
    steps = torch.arange(100, 112)
    figure = check_layout(figures.load_curves(runs, steps=steps, width=4))
    for ax, name in zip(figure.axes, figures.CURVES, strict=True):
        for line, history in zip(ax.lines, runs.values(), strict=True):
            windows = history.view(3, 4, 3, 8).sum(1)
            want = metrics.load_metrics(windows)[name].mean(-1)
            assert line.get_xdata().tolist() == [103, 107, 111]
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()), want)


def test_lines_differ_without_colour():
    styles = [figures.line_style(i, 10) for i in range(5)]
    assert len({str(style["linestyle"]) for style in styles}) == 5
    assert len({style["marker"] for style in styles}) == 5


@pytest.mark.parametrize("experts", [8, 256])
def test_histogram_is_sorted_and_relative(experts):
    layers = counts(1, 2, experts)[0]
    figure = check_layout(figures.load_histogram({"layer 0": layers[0], "layer 1": layers[1]}))
    first = torch.as_tensor(figure.axes[0].lines[0].get_ydata())
    assert first.diff().max() <= 0 and first.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("experts", [8, 30, 256])
def test_matrix(experts):
    values = torch.rand(experts, experts)
    figure = check_layout(figures.matrix(values, "Expert similarity", "cosine", 0, 1))
    image = figure.axes[0].images[0]
    torch.testing.assert_close(torch.as_tensor(image.get_array().data), values)
    assert image.get_clim() == (0, 1) and figure.axes[1].get_ylabel() == "cosine"
    with pytest.raises(ValueError, match=r"values must have shape \[E, E\], got \[2, 3\]"):
        figures.matrix(torch.rand(2, 3), "", "", 0, 1)


def test_loss_terms_leave_out_what_a_logarithm_cannot_show():
    figure = check_layout(figures.loss_terms({"switch": [1.5, 1.2, 1.0], "z": [0.0, -1.0, 4.0]}))
    switch, z = (torch.as_tensor(line.get_ydata()) for line in figure.axes[0].lines)
    assert switch.tolist() == [1.5, 1.2, 1.0] and z.isnan().tolist() == [True, True, False]
    assert figure.axes[0].get_yscale() == "log"


def test_bad_histories():
    for runs in ({"a": counts(3, 2, 4), "b": counts(2, 2, 4)}, {"a": torch.ones(3, 4)}, {}):
        with pytest.raises(ValueError, match=r"counts must be \[S, L, E\]"):
            figures.load_curves(runs)
